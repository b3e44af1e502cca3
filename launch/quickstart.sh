#!/usr/bin/env bash
# From weakly labelled recordings to a trained separator, on bundled sounds, in a few minutes on two
# cores: bash launch/quickstart.sh [SEED]. Results go to out/.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment
use_huge_pages

seed="${1:-0}"
[[ "$seed" =~ ^[0-9]+$ ]] || fail "The seed must be a whole number from 0, not '$seed'."
sounds=uss_jax/assets/demo
records=out/data/demo/1.0.0
runs="out/seed$seed"
export PYTHONUNBUFFERED=1
# Two CPU devices share each batch of 6, as the chips of a pod would; 4 or 8 do not divide it.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" JAX_NUM_CPU_DEVICES=2

step() {
    printf '\n== %s\n' "$1"
    shift
    .venv/bin/uss-jax "$@"
}

began=$SECONDS
mkdir -p "$runs"
rm -f out/example*
for split in train test; do
    step "Convert recordings and labels to records: $split" prepare --audio "$sounds" \
        --labels "$sounds/manifest.csv" --out out/data --name demo --version 1.0.0 \
        --split "$split" --sample-rate 16000 --clip-seconds 5 --overwrite
done
step "Evaluate YAMNet's anchors on sounds planted at known positions" evaluate planted \
    --model yamnet --data "$records" --split train --clips 50 --seed "$seed" \
    --out "$runs/planted.json"
step "Find anchors in the training recordings, and their conditions, with it" mine \
    --records "$records" --split train --sed yamnet --query yamnet --out "$runs/anchors.npz"
step "Train a separator on these anchors" train --config configs/quickstart.py:part=separator \
    --workdir "$runs/separator" --config.data.records="$records" --config.seed="$seed" \
    --config.anchors.table="$runs/anchors.npz" --config.query.table="$runs/anchors.conditions"
step "Build mixtures of held-out recordings" make-pairs --records "$records" --split test \
    --sed yamnet --groups "$sounds/manifest.csv" --per-class 4 --seed 0 \
    --out "$runs/pairs" --overwrite
step "Evaluate the separation of these mixtures" evaluate pairs --model "$runs/separator" \
    --data "$runs/pairs" --train-records "$records" --bank "$runs/classes.npz" \
    --examples 3 --out-dir out --out "$runs/results.json"
mixture="$(ls "$PWD"/out/example2_*_mixture.wav)"
class="${mixture##*/example2_}"
step "Separate one of these mixtures, with the class of its target as query" separate "$mixture" \
    --model "$runs/separator" --query "$runs/classes.npz" --classes "${class%_mixture.wav}" \
    --residual --overwrite --out out/separated
step "Separate it by the top level of the ontology" separate "$mixture" --model "$runs/separator" \
    --levels 1 --overwrite --out out/levels

printf '\nDone in %d s. In out/: example*.wav and example*.png (mixture, target, estimate),\n' \
    $((SECONDS - began))
printf 'separated/ and levels/ (sounds). The trained model and its results.json (all metrics) are in %s/.\n' \
    "$runs"
