#!/bin/sh
# Train on all GPUs of this node:
#
#     examples/many-gpus/torchrun.sh run.yaml [key=value ...]
#
# On several nodes, run the same command on each of them, with the name of the first one:
#
#     NODES=2 HEAD=node-a examples/many-gpus/torchrun.sh run.yaml [key=value ...]
#
# RANKS: processes per node (default: one per GPU). RESTARTS: how often torchrun starts all ranks again
# after one has failed; they go on from the last checkpoint.
#
# TESTED on CPUs: two ranks on one node over Gloo, and two "nodes" on one machine (RANKS=1, device=cpu).
# UNTESTED: GPUs (NCCL), several machines.
set -eu

if [ "${NODES:-1}" -gt 1 ]; then
    meeting="--rdzv-backend=c10d --rdzv-endpoint=$HEAD:${PORT:-29500} --rdzv-id=${JOB:-horizon}"
else
    meeting=--standalone
fi
# shellcheck disable=SC2086  # several words
exec torchrun --nnodes="${NODES:-1}" --nproc-per-node="${RANKS:-gpu}" --max-restarts="${RESTARTS:-3}" \
    $meeting -m horizon_lm train "$@"
