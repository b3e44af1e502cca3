#!/usr/bin/env bash
# A run on a Cloud TPU pod slice, the same command on every worker:
#   TPU=name ZONE=us-east5-b bash launch/tpu_pod.sh install
#   TPU=name ZONE=us-east5-b bash launch/tpu_pod.sh train --config F --workdir /mnt/shared/run ...
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TPU:?give the name of the TPU VM}" "${ZONE:?give its zone}"
[ $# -ge 1 ] || {
    echo "usage: TPU=name ZONE=zone bash launch/tpu_pod.sh install|COMMAND ..." >&2
    exit 2
}
on_every_worker() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [ "$1" = install ]; then
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU:uss_jax.tar.gz" --zone="$ZONE" --worker=all
    on_every_worker 'mkdir -p uss_jax && tar -xzf uss_jax.tar.gz -C uss_jax && cd uss_jax &&
        python3 -m venv .venv && .venv/bin/pip install --quiet "jax[tpu]" --editable .'
else
    on_every_worker "cd uss_jax && JAX_COMPILATION_CACHE_DIR=\$HOME/.jax_cache \
        .venv/bin/uss-jax $(printf '%q ' "$@")"
fi
