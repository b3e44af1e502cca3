#!/usr/bin/env bash
# Installs bytedance/uss with each of some versions of Lightning into .original/ and shows that it
# loads what `uss-jax convert` writes: bash launch/original.sh [VERSION...]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment 'test,torch'
[ $# -gt 0 ] || set -- 1.9.5 2.0.9 2.6.6
pythons=""
for version in "$@"; do
    place=.original/$version
    if [ ! -e "$place/done" ]; then
        python3 -m venv "$place"
        # setuptools: Lightning 1.9 asks it for pkg_resources.
        "$place/bin/pip" install --quiet --disable-pip-version-check "lightning==$version" torch \
            librosa torchlibrosa einops pandas h5py matplotlib panns_inference 'setuptools<81'
        "$place/bin/pip" install --quiet --disable-pip-version-check --no-deps uss==0.0.4
        touch "$place/done"
    fi
    pythons+=" $PWD/$place/bin/python"
done
USS_ORIGINAL_PYTHONS=$pythons .venv/bin/python -m pytest -s tests/weights/test_original_program.py
