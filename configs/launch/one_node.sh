#!/usr/bin/env bash
# One node: every GPU a rank, or GPUS of them; a lost rank restarts all from the last checkpoint, RESTARTS times (default 3).
#
#   configs/launch/one_node.sh VERB CONFIG.toml --run DIR [key=value ...]
set -euo pipefail
source "$(dirname "$0")/environment.sh"

exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" --no-python -- warpline "$@"
