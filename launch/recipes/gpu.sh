#!/usr/bin/env bash
# One machine with NVIDIA GPUs: all of them along `fsdp`, one process.
#
#   launch/recipes/gpu.sh --config configs/tiny.py --workdir runs/tiny
set -euo pipefail
cd "$(dirname "$0")/../.."
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
exec python launch/tpu_pretrain.py --set mesh.fsdp="$gpus" --set compute.dtype=bfloat16 "$@"
