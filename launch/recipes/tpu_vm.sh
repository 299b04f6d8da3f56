#!/usr/bin/env bash
# One TPU VM (v5litepod-8, v6e-8, ...): creates it, installs the checkout, trains in a tmux session that outlives ssh.
#
#   NAME=omni ZONE=us-central1-a TYPE=v6e-8 VERSION=v2-alpha-tpuv6e DATA=gs://bucket/data launch/recipes/tpu_vm.sh \
#       --config configs/tiny.py --set mesh.fsdp=8 --set compute.dtype=bfloat16
set -euo pipefail
: "${NAME:?name of the TPU VM}" "${ZONE:?}" "${TYPE:?accelerator type}" "${VERSION:?runtime version}"
WORKDIR=${WORKDIR:-runs/$NAME}
root=$(cd "$(dirname "$0")/../.." && pwd)
tpu=(gcloud compute tpus tpu-vm)

"${tpu[@]}" describe "$NAME" --zone "$ZONE" >/dev/null 2>&1 ||
  "${tpu[@]}" create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" --version "$VERSION"

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format=tar.gz --output="$archive" HEAD
"${tpu[@]}" scp "$archive" "$NAME:omni.tar.gz" --zone "$ZONE"
"${tpu[@]}" ssh "$NAME" --zone "$ZONE" --command \
  "mkdir -p omni && tar xzf omni.tar.gz -C omni && cd omni && python3 -m venv .venv && .venv/bin/pip install -q '.[tpu,sample]'"
if [[ -n ${DATA:-} ]]; then
  "${tpu[@]}" ssh "$NAME" --zone "$ZONE" --command "mkdir -p omni/data && gcloud storage rsync -r '$DATA' omni/data"
fi
train=$(printf '%q ' .venv/bin/python launch/tpu_pretrain.py --workdir "$WORKDIR" "$@")
"${tpu[@]}" ssh "$NAME" --zone "$ZONE" --command "cd omni && tmux new-session -d -s train $(printf '%q' "$train 2>&1 | tee -a train.log")"
echo "started; follow it: gcloud compute tpus tpu-vm ssh $NAME --zone $ZONE --command 'tail -f omni/train.log'"
