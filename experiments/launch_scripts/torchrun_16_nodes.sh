#!/usr/bin/env bash
# On each of NODES machines, without a scheduler. The first of them is number 0 and lends its address:
#   NODE_RANK=0 MASTER_ADDR=10.0.0.1 experiments/launch_scripts/torchrun_16_nodes.sh generator/paper/pretrain_256 [key=value …]
#   NODE_RANK=1 MASTER_ADDR=10.0.0.1 …                              and so on to NODE_RANK=15
# All machines need the same checkout, and runs_dir and data on file systems that they share.
set -euo pipefail
NODES=${NODES:-16}
DEVICES=${DEVICES:-8}
PYTHON=${PYTHON:-python}
: "${NODE_RANK:?number of this machine, from 0}" "${MASTER_ADDR:?address of machine 0}"
CONFIG=$1
shift

# Weights are divided inside a machine; only gradients cross between machines.
SHARDING=(trainer.strategy=fsdp trainer.sharding_size="$DEVICES")
exec "$PYTHON" -m torch.distributed.run \
  --nnodes="$NODES" --node-rank="$NODE_RANK" --nproc-per-node="$DEVICES" \
  --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
  -m experiments.train "$CONFIG" trainer.num_nodes="$NODES" trainer.devices="$DEVICES" "${SHARDING[@]}" "$@"
