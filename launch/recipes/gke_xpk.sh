#!/usr/bin/env bash
# One or more slices of a GKE cluster that was made with xpk; restarts after preemption go on from the last checkpoint.
#
#   CLUSTER=omni PROJECT=p ZONE=us-east5-a TYPE=v5p-128 SLICES=2 IMAGE=gcr.io/p/omni launch/recipes/gke_xpk.sh \
#       --config configs/omni_64k.py --workdir /mnt/omni/runs/omni_64k --set mesh.slices=2 --set mesh.data=2
#
# IMAGE holds the checkout at /omni with `.[tpu]` installed (launch/recipes/Dockerfile); the shared folder of workdir and
# data is a volume of the cluster (`xpk storage attach`, Filestore or Cloud Storage FUSE).
set -euo pipefail
: "${CLUSTER:?}" "${PROJECT:?}" "${ZONE:?}" "${TYPE:?slice type}" "${IMAGE:?docker image}"
command=$(printf '%q ' python launch/tpu_pretrain.py --multihost "$@")
xpk workload create \
  --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE" \
  --workload "${WORKLOAD:-omni}" --tpu-type "$TYPE" --num-slices "${SLICES:-1}" \
  --docker-image "$IMAGE" --max-restarts "${RESTARTS:-20}" \
  --command "cd /omni && exec $command"
