#!/usr/bin/env bash
# A slice of several hosts (v5p-128, v6e-32, ...) that exists: the same command on every host, and the same shared folder.
#
#   NAME=omni ZONE=us-east5-a BUCKET=my-bucket launch/recipes/tpu_pod.sh \
#       --config configs/omni_64k.py --workdir /mnt/omni/runs/omni_64k --set data.root=/mnt/omni/data
#
# BUCKET is mounted at /mnt/omni on every host by Cloud Storage FUSE, which must be installed on the hosts. Any other
# file system that all hosts see (Filestore, NFS) will do: mount it there and leave BUCKET empty.
set -euo pipefail
: "${NAME:?name of the slice}" "${ZONE:?}"
root=$(cd "$(dirname "$0")/../.." && pwd)
on_all() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"; }

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$NAME:omni.tar.gz" --zone "$ZONE" --worker=all
on_all "mkdir -p omni && tar xzf omni.tar.gz -C omni && cd omni && python3 -m venv .venv && .venv/bin/pip install -q '.[tpu]'"
if [[ -n ${BUCKET:-} ]]; then
  on_all "sudo mkdir -p /mnt/omni && sudo chown \$USER /mnt/omni && (mountpoint -q /mnt/omni || gcsfuse --implicit-dirs '$BUCKET' /mnt/omni)"
fi
train=$(printf '%q ' .venv/bin/python launch/tpu_pretrain.py --multihost "$@")
on_all "cd omni && tmux new-session -d -s train $(printf '%q' "$train 2>&1 | tee -a train.log")"
echo "started; follow host 0: gcloud compute tpus tpu-vm ssh $NAME --zone $ZONE --worker=0 --command 'tail -f omni/train.log'"
echo "stop and save: gcloud compute tpus tpu-vm ssh $NAME --zone $ZONE --worker=0 --command 'pkill -TERM -of tpu_pretrain.py'"
