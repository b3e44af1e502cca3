#!/usr/bin/env bash
# N processes of one run on this host, which share its GPUs or have CPU devices of their own:
#   bash launch/local.sh N train --config F --workdir D ...
# CUDA_VISIBLE_DEVICES names the GPUs to share, JAX_PLATFORMS=cpu leaves them alone,
# JAX_NUM_CPU_DEVICES=K gives each process K devices, and PYTHON=P takes another Python than the one
# in .venv.
set -euo pipefail
# Older ones do not tell which process has ended.
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || {
    echo "bash 5.1 or newer is needed, this is $BASH_VERSION" >&2
    exit 2
}
[[ "${1:-}" =~ ^[1-9][0-9]*$ && $# -ge 2 ]] || {
    echo "usage: bash launch/local.sh N COMMAND ..., for example 2 train --config F --workdir D" >&2
    exit 2
}
processes=$1
shift
python="${PYTHON:-$(dirname "$0")/../.venv/bin/python}"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
gpus=()
if [ "${JAX_PLATFORMS:-}" != cpu ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
        [[ "${gpus[0]:-}" != -* ]] || gpus=() # -1 hides all
    else
        count=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
        for ((gpu = 0; gpu < count; gpu++)); do gpus+=("$gpu"); done
    fi
fi
each=$((${#gpus[@]} / processes))
if [ $((each * processes)) -ne ${#gpus[@]} ]; then
    echo "${#gpus[@]} GPUs cannot be shared evenly by $processes processes; give another number" >&2
    exit 2
fi

export JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES=$processes
pids=()
for ((process = 0; process < processes; process++)); do
    export JAX_PROCESS_ID=$process
    if [ "$each" -gt 0 ]; then
        CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:process * each:each}")
        export CUDA_VISIBLE_DEVICES
    fi
    "$python" -m uss_jax.cli.main "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

# The first that fails decides how this ends; the others notice, and end by themselves.
status=0
for ((left = processes; left > 0;)); do
    code=0
    wait -n -p ended || code=$?
    [ -n "${ended:-}" ] || continue # a signal, which the trap has passed on
    left=$((left - 1))
    [ "$status" -ne 0 ] || status=$code
done
exit "$status"
