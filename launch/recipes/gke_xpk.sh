#!/usr/bin/env bash
# One or more slices of a GKE cluster that was made with xpk; a preempted one comes back and goes on from the last save.
#
#   CLUSTER=omni PROJECT=p ZONE=us-east5-a TYPE=v5p-128 IMAGE=gcr.io/p/omni SAVE_SECONDS=120 STEP_SECONDS=4 \
#       launch/recipes/gke_xpk.sh create --config omni_64k --workdir gs://my-bucket/runs/omni_64k
#
#   image               builds IMAGE of this checkout (launch/recipes/Dockerfile) and pushes it
#   create ARGUMENTS    starts `baichuan-omni train ARGUMENTS` on every host
#   delete              ends the workload; the cluster stays
#
# Variables: CLUSTER, PROJECT, ZONE, TYPE, IMAGE, and
#   SAVE_SECONDS, STEP_SECONDS   of a checkpoint and of a step, as WORKDIR/metrics.jsonl has them: the pods' grace period
#   SLICES=N            joined by the data-center network: give mesh.slices and mesh.data too
#   SPOT=1              pods of spot nodes have 15 s after SIGTERM, whatever is asked for
#   DOCTOR=short        what looks the hosts over before every start: short, full or no
#   WORKLOAD=omni       its name; RESTARTS=100 of the workload after lost nodes
# shellcheck disable=SC2153  # variables are the user's
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/recipes/lib.sh
. "$here/lib.sh"
WORKLOAD=${WORKLOAD:-omni}
action=${1:?image, create or delete}
shift

needs_cluster() {
  has_program xpk
  needs CLUSTER
  needs PROJECT
  needs ZONE
}

create() {
  local grace slices=${SLICES:-1} workdir command extra=() first=()
  needs_cluster
  needs TYPE "the slice, as v5p-128"
  needs IMAGE "of docker"
  needs SAVE_SECONDS "of a checkpoint, as metrics.jsonl has them"
  needs STEP_SECONDS "of a step"
  SLICES=$slices
  whole SLICES 1
  workdir=$(value_of --workdir "$@")
  [[ $workdir == *://* || $workdir == /* ]] || fail "--workdir ${workdir:-(none)} lies in the pod and goes with it: give a URL, or the absolute path of a volume"
  grace=$(grace_of "$SAVE_SECONDS" "$STEP_SECONDS")
  if [[ -n ${SPOT:-} ]]; then
    extra=(--spot)
    ((grace <= 15)) || say "a spot node leaves 15 s, a stop may take $grace s: what is lost at a preemption is bounded by checkpoint.every alone"
  fi
  command=(.venv/bin/baichuan-omni train "$@" --stopped-code 75)
  (($(hosts_of "$TYPE") * slices == 1)) || command+=(--multihost)
  doctor_first "${command[@]}"
  # Crashes are mended inside the pod. xpk starts the workload anew for the codes 42 and 127 to 255, so for a pod that
  # was told to stop (143) and not for 2 and 3. `exec`: the signal must reach the supervisor, not a shell around it.
  xpk workload create \
    --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE" \
    --workload "$WORKLOAD" --tpu-type "$TYPE" --num-slices "$slices" "${extra[@]}" \
    --docker-image "$IMAGE" --max-restarts "${RESTARTS:-100}" --termination-grace-period-seconds "$grace" \
    --command "exec bash launch/recipes/supervise $(quoted "${first[@]}")-- $(quoted "${command[@]}")"
}

case $action in
  image)
    has_program docker
    needs IMAGE "of docker"
    docker build --file "$here/Dockerfile" --build-arg ACCELERATOR="${ACCELERATOR:-tpu}" --build-arg EXTRAS="${EXTRAS-gcs}" --tag "$IMAGE" "$here/../.."
    docker push "$IMAGE"
    ;;
  create) create "$@" ;;
  delete)
    needs_cluster
    xpk workload delete --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE" --workload "$WORKLOAD" --force
    ;;
  *) fail "there is no $action: image, create or delete" ;;
esac
