#!/usr/bin/env bash
# Installs bytedance/uss with each of some versions of Lightning into .original/ and shows that it
# loads what `uss-jax convert` writes: bash launch/original.sh [VERSION...]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment 'test'
torch=torch==2.13.0
.venv/bin/python -m pip install --quiet --disable-pip-version-check "$torch"
[ $# -gt 0 ] || set -- 1.9.5 2.0.9 2.4.0 2.6.6
pythons=()
for version in "$@"; do
    place=.original/$version
    if [ ! -e "$place/done" ]; then
        packages=("lightning==$version" "$torch" librosa torchlibrosa einops pandas h5py matplotlib)
        # Lightning 1.9 needs pkg_resources, which newer setuptools lacks, and a lightning-cloud of its
        # time.
        packages+=(panns_inference 'setuptools<81')
        [[ $version != 1.* ]] || packages+=(lightning-cloud==0.5.31)
        python3 -m venv "$place"
        "$place/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
        "$place/bin/pip" install --quiet --disable-pip-version-check --no-deps uss==0.0.4
        touch "$place/done"
    fi
    pythons+=("$PWD/$place/bin/python")
done
USS_ORIGINAL_PYTHONS=$(IFS=: && echo "${pythons[*]}")
export USS_ORIGINAL_PYTHONS
.venv/bin/python -m pytest -s tests/weights/test_original_program.py
