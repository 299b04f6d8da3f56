#!/usr/bin/env bash
# Several machines with NVIDIA GPUs under Slurm, one process a GPU; the checkout, data and workdir on a shared disk.
#
#   sbatch --nodes 4 launch/recipes/gpu_slurm.sh --config configs/tiny.py --workdir runs/tiny --set mesh.fsdp=32
#
# Slurm sends SIGTERM ten minutes before the time limit: the run saves and leaves. The same command goes on.
#SBATCH --job-name=omni
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
srun python launch/tpu_pretrain.py --multihost --set compute.dtype=bfloat16 "$@"
