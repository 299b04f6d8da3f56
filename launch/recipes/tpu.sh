#!/usr/bin/env bash
# TPU VMs: one host or a slice of many, one slice or several, from the request to the last step.
#
#   NAME=omni ZONE=us-east5-a TYPE=v5p-128 launch/recipes/tpu.sh run --config omni_64k --workdir gs://my-bucket/runs/omni_64k
#
#   run ARGUMENTS       up, start, wait; after a preemption again; then down (DELETE). Safe to call again at any time
#   up                  requests the slices that are missing, waits for them, installs HEAD of this checkout
#   start ARGUMENTS     starts `baichuan-omni train ARGUMENTS` on every host, supervised, detached from ssh
#   wait                until the run has ended; its code
#   log | status        follows host 0's output | what each host says
#   stop                SIGTERM: the run saves and leaves, and `run` with it
#   down                deletes the slices and their disks
#
# Variables: NAME, ZONE, TYPE (v5litepod-8, v5p-8, v6e-32, ...), and
#   PROJECT             else gcloud's own
#   SPOT=1              preemptible, cheaper. RESERVED=1: of a reservation
#   SLICES=N            joined by the data-center network: adds mesh.slices=N and mesh.data=N
#   MESH_K=SETTINGS     for K slices, as MESH_2='mesh.fsdp=8 mesh.context=8'
#   MIN_SLICES=K        with how many the run goes on while lost ones are waited for (default SLICES)
#   EXTRAS=gcs,sample   of the package (default gcs)
#   DATA=gs://...       a data set, copied to every host's disk; adds data.root
#   FUSE=BUCKET         mounted at /mnt/omni on every host; it must have a hierarchical namespace
#   DELETE=finished     `run` deletes the slices when the run has finished | always | never
#   WAIT_FOR=S          seconds to wait for slices (default 0: without end); POLL=S between looks (default 30)
#   RETURNS=N           preemptions after which `run` gives up (default 100); STOP_FOR=S until a host that does not stop
#                       is killed (default 900)
#   DOCTOR=short        what looks the hosts over before every start: short, full or no
#   VERSION, ACCELERATOR  the image of the VMs, and the constraints file (default tpu)
# shellcheck disable=SC2016,SC2153  # variables are the user's; what stands in single quotes is for the hosts' shells
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/recipes/lib.sh
. "$here/lib.sh"
needs NAME "name of the slices"
needs ZONE "as us-east5-a"
needs TYPE "the accelerator, as v5p-128"
SLICES=${SLICES:-1} MIN_SLICES=${MIN_SLICES:-${SLICES:-1}} EXTRAS=${EXTRAS-gcs} FUSE=${FUSE:-} DATA=${DATA:-} DELETE=${DELETE:-finished}
SPOT=${SPOT:-} RESERVED=${RESERVED:-} WAIT_FOR=${WAIT_FOR:-0} POLL=${POLL:-30} RETURNS=${RETURNS:-100} STOP_FOR=${STOP_FOR:-900}
ACCELERATOR=${ACCELERATOR:-tpu}
formed NAME '[a-z][-a-z0-9]{0,50}' "small letters, digits and -"
formed FUSE '([a-z0-9][-a-z0-9._]*)?' "the name of a bucket, without gs://"
formed DATA '((gs|s3)://[^/]+/.+)?' "a folder in a bucket, gs://BUCKET/PATH"
formed EXTRAS '[-a-z0-9,_]*' "names of extras, with commas between"
formed POLL '[0-9]+(\.[0-9]+)?' "seconds"
formed DELETE '(finished|always|never)' "finished, always or never"
whole SLICES 1
whole MIN_SLICES 1
whole WAIT_FOR 0
whole RETURNS 0
whole STOP_FOR 0
((MIN_SLICES <= SLICES)) || fail "MIN_SLICES $MIN_SLICES is more than SLICES $SLICES"
has_program gcloud
hosts=$(hosts_of "$TYPE")
VERSION=${VERSION:-$(runtime_of "$TYPE")}
where=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})

slice_name() { if ((SLICES == 1)); then echo "$NAME"; else echo "$NAME-$1"; fi; }
# UNKNOWN where gcloud could not find out (no network, a login that has run out): no reason to request a slice anew.
refusal=$(mktemp)
trap 'rm -f "$refusal"' EXIT
state_of() {
  gcloud compute tpus queued-resources describe "$(slice_name "$1")" "${where[@]}" --format='value(state.state)' 2>"$refusal" || {
    if grep -qi 'not.found' "$refusal"; then echo ABSENT; else echo UNKNOWN; fi
  }
}
why_unknown() { echo "gcloud does not tell the state of $(slice_name "$1"): $(grep -v '^ *$' "$refusal" | tail -n 1)"; }
# The slices that are there, by number, and a ? for each that may be.
looked_at() {
  local slice
  for ((slice = 0; slice < SLICES; slice++)); do
    case $(state_of "$slice") in
      ACTIVE) echo "$slice" ;;
      UNKNOWN) echo '?' ;;
    esac
  done
}
present() { looked_at | grep -v '?' || true; }
first_present() { present | head -n 1; }
# A command on the hosts of a slice: its number, the workers (all, or a number), the command.
on() {
  gcloud compute tpus tpu-vm ssh "$(slice_name "$1")" "${where[@]}" --worker="$2" --command "$3"
}
requested=() begun=''
delete_slice() { gcloud compute tpus queued-resources delete "$(slice_name "$1")" "${where[@]}" --force --quiet; }

request() {
  local slice=$1 name tier=()
  name=$(slice_name "$slice")
  [[ -z $SPOT ]] || tier=(--spot)
  [[ -z $RESERVED ]] || tier=(--reserved)
  say "requesting $name: $TYPE${SPOT:+, spot}"
  gcloud compute tpus queued-resources create "$name" --node-id "$name" "${where[@]}" \
    --accelerator-type "$TYPE" --runtime-version "$VERSION" "${tier[@]}"
  requested+=("$slice")
}

# Requests what is missing. A preempted or failed request is in the way of a new one of its name.
request_missing() {
  local slice state
  for ((slice = 0; slice < SLICES; slice++)); do
    state=$(state_of "$slice")
    case $state in
      ABSENT) request "$slice" ;;
      # Later it may be the network's, and is waited for.
      UNKNOWN) [[ -n $begun ]] || fail "$(why_unknown "$slice")" ;;
      SUSPENDED | FAILED)
        say "$(slice_name "$slice") is $state: deleting it, and requesting it anew"
        delete_slice "$slice"
        request "$slice"
        ;;
    esac
  done
}

# Waits until at least $1 slices are there. A request that fails before anything has run is likely one that cannot be
# met at all (a quota, a type, a zone); later it is a lack of free chips, and asked anew.
wait_for_slices() {
  local wanted=$1 began=$SECONDS slice state found
  while true; do
    found=0
    for ((slice = 0; slice < SLICES; slice++)); do
      state=$(state_of "$slice")
      case $state in
        ACTIVE) found=$((found + 1)) ;;
        # Seen while it was still being taken away (SUSPENDING), or deleted by somebody else meanwhile.
        SUSPENDED | ABSENT) request_missing ;;
        UNKNOWN) say "$(why_unknown "$slice")" ;;
        FAILED)
          if [[ -z $begun ]]; then
            say "the request for $(slice_name "$slice") failed"
            return 1
          fi
          request_missing
          ;;
      esac
    done
    ((found < wanted)) || return 0
    if ((WAIT_FOR && SECONDS - began >= WAIT_FOR)); then
      say "$found of $SLICES slices after $WAIT_FOR s"
      return 1
    fi
    sleep "$POLL"
  done
}

# HEAD of this checkout on every host of a slice, installed; a host that has it already does nothing.
install_on() {
  local slice=$1 head archive
  head=$(git -C "$here" rev-parse HEAD)
  if ! on "$slice" all "grep -qx $head omni/.installed" >/dev/null 2>&1; then
    say "installing on $(slice_name "$slice")"
    archive=$(mktemp)
    git -C "$here/../.." archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$(slice_name "$slice"):omni.tar.gz" "${where[@]}" --worker=all
    rm -f "$archive"
    on "$slice" all "mkdir -p omni && tar xzf omni.tar.gz -C omni && bash omni/launch/recipes/install $ACCELERATOR $EXTRAS && echo $head > omni/.installed" || return 1
  fi
  [[ -z $DATA ]] || on "$slice" all "mkdir -p omni/data/omni && gcloud storage rsync --recursive $(quoted "$DATA") omni/data/omni" || return 1
  # A mount does not outlive a restart of its host; without it the run would write onto the host's own disk.
  if [[ -n $FUSE ]]; then
    on "$slice" all "sudo mkdir -p /mnt/omni && sudo chown \$(id -u) /mnt/omni && { mountpoint -q /mnt/omni || gcsfuse $FUSE /mnt/omni; }"
  fi
}

up() {
  local slice failed=''
  [[ -z $FUSE ]] || check_namespace "$FUSE"
  request_missing
  if ! wait_for_slices "${1:-$SLICES}"; then
    # Nothing that this call asked for may stay and cost money; what was there before is not this call's.
    for slice in "${requested[@]}"; do
      say "deleting $(slice_name "$slice")"
      delete_slice "$slice"
    done
    exit 1
  fi
  for slice in $(present); do
    install_on "$slice" || failed=yes
  done
  if [[ -n $failed ]]; then
    say "the installation failed; the slices stay for a look: '$0 down' deletes them"
    exit 1
  fi
}

# A workdir on the disk of a VM goes with the VM.
check_workdir() {
  local workdir
  workdir=$(value_of --workdir "$@")
  case $workdir in
    '') fail "--workdir must be given" ;;
    *://*) [[ ,$EXTRAS, == *,gcs,* || $workdir != gs://* ]] || fail "--workdir $workdir needs EXTRAS=gcs" ;;
    /mnt/omni/*) [[ -n $FUSE ]] || fail "--workdir $workdir: nothing is mounted at /mnt/omni without FUSE=BUCKET" ;;
    /*) ;;
    *)
      ((hosts * SLICES == 1)) || fail "--workdir $workdir: the hosts of $TYPE share no disk: give it as gs://BUCKET/..."
      [[ -z $SPOT && $DELETE == never ]] ||
        fail "--workdir $workdir lies on the VM's disk and goes with it: give it as gs://BUCKET/..., or DELETE=never without SPOT"
      ;;
  esac
}

start() {
  local numbers number slice train coordinator='' environment mesh first=()
  check_workdir "$@"
  mapfile -t numbers < <(present)
  ((${#numbers[@]})) || fail "no slice of $NAME is there: '$0 up' first"
  train=(.venv/bin/baichuan-omni train "$@" --stopped-code 75)
  ((hosts * SLICES == 1)) || train+=(--multihost)
  [[ -z $DATA ]] || train+=(--set data.root=data/omni)
  if ((SLICES > 1)); then
    # The slices that are there make the mesh; what they need to find each other is given, as each was requested alone.
    mesh=MESH_${#numbers[@]}
    for setting in "mesh.slices=${#numbers[@]}" "mesh.data=${#numbers[@]}" ${!mesh:-}; do
      train+=(--set "$setting")
    done
    coordinator=$(gcloud compute tpus tpu-vm describe "$(slice_name "${numbers[0]}")" "${where[@]}" --format='value(networkEndpoints[0].ipAddress)')
  fi
  doctor_first "${train[@]}"
  for ((number = 0; number < ${#numbers[@]}; number++)); do
    slice=${numbers[number]} environment=''
    if ((SLICES > 1)); then
      environment="MEGASCALE_COORDINATOR_ADDRESS=$coordinator MEGASCALE_PORT=8080 MEGASCALE_NUM_SLICES=${#numbers[@]} MEGASCALE_SLICE_ID=$number"
    fi
    # Away from ssh, which ends; at most one at a time. One that has written its code is leaving, or has left and was not
    # buried yet: a process of its number may still be there.
    on "$slice" all "cd omni || exit 1
      if [ ! -f train.code ] && [ -f train.pid ] && kill -0 \$(cat train.pid) 2>/dev/null; then echo 'error: a run is at work here' >&2; exit 2; fi
      rm -f train.code train.stop
      $environment setsid nohup bash launch/recipes/supervise --code train.code $(quoted "${first[@]}")-- $(quoted "${train[@]}") >>train.log 2>&1 </dev/null &
      echo \$! >train.pid"
  done
  say "started on ${#numbers[@]} of $SLICES slices"
}

# One line a host: "code N", "running", or "gone" where the host was started anew under a run.
look='cd omni 2>/dev/null; if [ -f train.code ]; then echo "code $(cat train.code)"; elif [ -f train.pid ] && kill -0 $(cat train.pid) 2>/dev/null; then echo running; else echo gone; fi'

# Waits until the run has ended, and gives its code in `code`; or "lost" where slices or hosts went away, or "more" where
# there are more slices than it runs on. $1: how many slices it runs on.
watch() {
  local running=$1 slice answers problems=0
  while true; do
    sleep "$POLL"
    mapfile -t numbers < <(looked_at)
    # What fails now and then is the network's, between here and Google or there and the host; three times in a row not.
    if [[ " ${numbers[*]} " == *' ? '* ]]; then
      problems=$((problems + 1))
      if ((problems < 3)); then continue; fi
      code=lost
      return 0
    fi
    if ((${#numbers[@]} != running)); then
      code=lost
      ((${#numbers[@]} < running)) || code="more"
      return 0
    fi
    answers=''
    for slice in "${numbers[@]}"; do
      answers+=$(on "$slice" all "$look" 2>/dev/null || echo unreachable)$'\n'
    done
    if [[ $answers == *unreachable* ]]; then
      problems=$((problems + 1))
      if ((problems < 3)); then continue; fi
      code=lost
      return 0
    fi
    problems=0
    code=$(awk '$1 == "code" && $2 != 0 { print $2; exit }' <<<"$answers")
    [[ -z $code ]] || return 0
    if [[ $answers == *gone* ]]; then
      code=lost
      return 0
    fi
    if [[ $answers != *running* ]]; then
      code=0
      return 0
    fi
  done
}

# A signal to the run on every host; `$2` is a command to run there before.
signal_all() {
  local slice
  for slice in $(present); do
    on "$slice" all "${2:-true}; [ -f omni/train.code ] || [ ! -f omni/train.pid ] || kill -$1 \$(cat omni/train.pid) 2>/dev/null || true" || true
  done
}
# Until no host is at work: the last save takes its time. One that hangs is killed, with all that it started.
stop_all() {
  local began=$SECONDS slice
  signal_all TERM
  for slice in $(present); do
    while on "$slice" all "$look" 2>/dev/null | grep -q running; do
      if ((SECONDS - began >= STOP_FOR)); then
        say "a host of $(slice_name "$slice") did not stop in $STOP_FOR s: killing it"
        on "$slice" all 'kill -KILL -$(cat omni/train.pid) 2>/dev/null || true' || true
      fi
      sleep "$POLL"
    done
  done
}

down() {
  local slice
  for ((slice = 0; slice < SLICES; slice++)); do
    [[ $(state_of "$slice") == ABSENT ]] || { say "deleting $(slice_name "$slice")" && delete_slice "$slice"; }
  done
}

run() {
  local returns running wanted=$SLICES
  check_workdir "$@"
  for ((returns = 0; returns <= RETURNS; returns++)); do
    up "$wanted"
    begun=yes wanted=$MIN_SLICES
    running=$(present | wc -l)
    # A run that is at work already, of an earlier call, is waited for.
    [[ $(on "$(first_present)" 0 "$look" 2>/dev/null) == running ]] || start "$@"
    watch "$running"
    case $code in
      lost | more) say "$([[ $code == lost ]] && echo "slices or hosts were lost" || echo "a slice has come back"): the run goes on from its last save" ;;
      143)
        # By `stop`, or by a machine that shuts down.
        [[ $(on "$(first_present)" 0 'cat omni/train.stop' 2>/dev/null) != yes ]] || break
        say "stopped by a signal, and saved: starting it again"
        ;;
      *) break ;;
    esac
    # Whoever is left must be free before the mesh changes.
    stop_all
  done
  # Others may still try to find the host that has given up.
  [[ $code == 0 ]] || stop_all
  on "$(first_present)" 0 'tail -n 2000 omni/train.log' >"$NAME.log" 2>/dev/null || true
  say "the run left with $code; the end of host 0's output is in $NAME.log"
  case $DELETE-$code in
    never-*) say "the slices stay: '$0 down' deletes them" ;;
    always-* | *-0) down ;;
    *) say "the slices stay for a look, and cost money: '$0 down' deletes them" ;;
  esac
  [[ $code =~ ^[0-9]+$ ]] || code=1
  exit "$code"
}

action=${1:?run, up, start, wait, log, status, stop or down}
shift
case $action in
  run) run "$@" ;;
  up) up ;;
  start) start "$@" ;;
  wait)
    watch "$(present | wc -l)"
    say "the run left with $code"
    [[ $code =~ ^[0-9]+$ ]] || code=1
    exit "$code"
    ;;
  log) on "$(first_present)" 0 'tail -F omni/train.log' ;;
  status) for slice in $(present); do on "$slice" all "$look"; done ;;
  stop) signal_all TERM 'echo yes >omni/train.stop' ;;
  down) down ;;
  *) fail "there is no $action: run, up, start, wait, log, status, stop or down" ;;
esac
