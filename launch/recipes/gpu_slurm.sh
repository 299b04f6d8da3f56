#!/usr/bin/env bash
# Several machines with NVIDIA GPUs under Slurm, one process a GPU; the checkout, data and workdir on a shared disk.
#
#   launch/recipes/install cuda && sbatch --nodes 4 launch/recipes/gpu_slurm.sh --config omni_64k --set mesh.fsdp=8 \
#       --set mesh.context=4 --set home=/shared/omni --workdir /shared/omni/runs/omni_64k
#
# Slurm sends SIGTERM ten minutes before the time limit, and when a node is wanted back: the run saves, and the job
# queues itself again until the run has finished. Codes 2 and 3 end it: starting again would not help. DOCTOR=full
# looks the nodes over at length before the run, DOCTOR=no not at all.
#SBATCH --job-name=omni
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
# shellcheck source=launch/recipes/lib.sh
. launch/recipes/lib.sh
has_program srun
[[ -x .venv/bin/baichuan-omni ]] || fail "$PWD has no .venv: launch/recipes/install cuda, once, on the shared disk"
workdir=$(value_of --workdir "$@")
[[ $workdir == *://* || $workdir == /* ]] || fail "--workdir ${workdir:-(none)}: give an absolute path that all nodes see, or a URL"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}

# Above srun, not below: where one process has died the others end too, and all start again together. srun hands SIGTERM
# on to every process, and must not kill the others when the first has left: they may be at the last save.
interrupted='' code=0
train=(.venv/bin/baichuan-omni train --multihost --set compute.dtype=bfloat16 "$@" --stopped-code 75)
SRUN='srun --kill-on-bad-exit=0 ' doctor_first "${train[@]}"
launch/recipes/supervise "${first[@]}" -- srun --kill-on-bad-exit=0 "${train[@]}" &
child=$!
trap 'interrupted=yes; kill -TERM "$child" 2>/dev/null' TERM INT
set +e
wait_for "$child"
if ((code == 143)); then
  say "stopped by a signal, and saved: job ${SLURM_JOB_ID:-} goes back into the queue"
  [[ -z ${SLURM_JOB_ID:-} ]] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
