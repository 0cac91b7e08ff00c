#!/usr/bin/env bash
# Several nodes without a scheduler: run the same line on each, with NODES (how many), NODE (this one's number, from 0) and HEAD
# (the name or address of node 0, where the ranks meet; PORT 29400 there must be free and reachable). A lost rank ends the job
# on every node: start it again and it goes on from the last checkpoint.
#
#   NODES=8 NODE=0 HEAD=node-0 configs/launch/nodes.sh VERB CONFIG.toml --run DIR [key=value ...]
#
# DIR is on a file system that every node sees.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

exec torchrun --nnodes "${NODES:?how many nodes}" --node-rank "${NODE:?the number of this node, from 0}" \
  --master-addr "${HEAD:?the name of node 0}" --master-port "${PORT:-29400}" \
  --nproc-per-node "${GPUS:-gpu}" --max-restarts 0 --no-python -- warpline "$@"
