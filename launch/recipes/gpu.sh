#!/usr/bin/env bash
# One machine with NVIDIA GPUs: installs what is missing, and trains on all of them along `fsdp`, supervised.
#
#   launch/recipes/gpu.sh --config configs/tiny.py --workdir runs/tiny --set data.rows=8
#
# Variables: GPUS=N of the machine (default all); EXTRAS=sample of the package; DOCTOR=full looks the machine over
# at length before, DOCTOR=no not at all. Ctrl-C saves and leaves.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=launch/recipes/lib.sh
. launch/recipes/lib.sh
[[ -n ${GPUS:-} ]] || has_program nvidia-smi
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
whole gpus 0
((gpus > 0)) || fail "nvidia-smi lists no GPU"
[[ -x .venv/bin/baichuan-omni ]] || launch/recipes/install "${ACCELERATOR:-cuda}" "${EXTRAS-sample}"
# XLA takes three quarters of the memory by itself; preflight counts with 95 %.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}
train=(.venv/bin/baichuan-omni train --set mesh.fsdp="$gpus" --set compute.dtype=bfloat16 "$@" --stopped-code 75)
doctor_first "${train[@]}"
exec launch/recipes/supervise "${first[@]}" -- "${train[@]}"
