#!/usr/bin/env bash
# Trains the separator in the package, `demo`, on all bundled recordings but those for testing:
# bash launch/demo.sh [--config.key=value ...]. Takes an hour on two cores and resumes when
# interrupted; results go to out/demo.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment
use_huge_pages

sounds=uss_jax/assets
records=out/data/bundled/1.0.0
run=out/demo
# 4 or 8 accelerators do not divide its batch of 6.
export PYTHONUNBUFFERED=1 JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" JAX_NUM_CPU_DEVICES=2
uss_jax=.venv/bin/uss-jax

mkdir -p "$run"
# One list of both folders, its paths relative to $sounds.
{
    head -n 1 "$sounds/demo/manifest.csv"
    tail -q -n +2 "$sounds/demo/manifest.csv" | sed 's|^|demo/|'
    tail -q -n +2 "$sounds/more/manifest.csv" | sed 's|^|more/|'
} > out/bundled.csv
if [ ! -e "$records/index-train.npz" ]; then
    $uss_jax prepare --audio "$sounds" --labels out/bundled.csv --out out/data --name bundled \
        --version 1.0.0 --split train --sample-rate 16000
fi
$uss_jax mine --records "$records" --split train --sed yamnet --query yamnet --out "$run/anchors.npz"
$uss_jax train --config configs/demo.py --workdir "$run/separator" \
    --config.data.records="$records" --config.anchors.table="$run/anchors.npz" "$@"
rm -rf "$run/bundle.new"
means=(--class-means "$run/anchors.npz" --records "$records")
# Another kind of condition or query net may have none.
for key in query.kind query_bundle query_net query.finetune; do
    [[ "$*" != *config.$key* ]] || means=()
done
$uss_jax export "$run/separator" --format safetensors --without-packaged \
    "${means[@]}" --licence Apache-2.0 --out "$run/bundle.new"
rm -rf "$run/bundle"
mv "$run/bundle.new" "$run/bundle"
printf '\n%s is a model as the package holds one in %s. The card there has the figures of its own\nweights: before you share yours, evaluate them, write %s and run this again.\n' \
    "$run/bundle" "$sounds/separator" "$run/separator/card.md"
