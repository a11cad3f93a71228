#!/usr/bin/env bash
# One machine with DEVICES GPUs:   experiments/launch_scripts/torchrun_1_node.sh generator/paper/pretrain_256 [key=value …]
# Run it from the checkout. The same command again goes on where the run was.
set -euo pipefail
DEVICES=${DEVICES:-8}
PYTHON=${PYTHON:-python}
CONFIG=$1
shift

# torchrun makes every failure exit code 1; a run that was asked to stop leaves preempted.json in its folder.
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$DEVICES" \
  -m experiments.train "$CONFIG" trainer.num_nodes=1 trainer.devices="$DEVICES" "$@"
