# shellcheck shell=bash
# What the recipes share: sizes of slices, a bucket that can be mounted, grace periods, quoting. Sourced, not run.

fail() {
  echo "error: $*" >&2
  exit 2
}
say() { echo "$(basename "$0"): $(date -u +%FT%TZ) $*" >&2; }
# Words as one string that a shell reads as the same words.
quoted() { (($# == 0)) || printf '%q ' "$@"; }

# Refuse what cannot be used, before anything is asked for that costs money: a variable without a value ($2 says what it
# is), one that is no whole number from $2 on or not of the form $2, a program that is not there.
needs() { [[ -n ${!1:-} ]] || fail "$1 must be given${2:+: $2}"; }
whole() { [[ ${!1} =~ ^(0|[1-9][0-9]{0,8})$ && ${!1} -ge $2 ]] || fail "$1 must be a whole number of at least $2, not '${!1}'"; }
formed() { [[ ${!1} =~ ^$2$ ]] || fail "$1 '${!1}' cannot be used: $3"; }
has_program() { command -v "$1" >/dev/null || fail "$1 is not installed, or not on the PATH"; }

# Chips of an accelerator type: v5p counts its cores, two a chip; v5litepod (v5e) and v6e count chips.
chips_of() {
  local type=$1 number=${1##*-}
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "$type is no accelerator type such as v5litepod-8, v5p-128, v6e-32"
  case $type in
    v4-* | v5p-*) echo $((number / 2)) ;;
    v5litepod-* | v6e-*) echo "$number" ;;
    *) fail "$type is no accelerator type that the recipes know (v4, v5litepod, v5p, v6e)" ;;
  esac
}

# Hosts of a slice: v5litepod-8 and v6e-8 are one machine, larger ones have four chips a host.
hosts_of() {
  local chips
  chips=$(chips_of "$1") || exit
  case $1 in
    v5litepod-* | v6e-*) echo $((chips <= 8 ? 1 : chips / 4)) ;;
    *) echo $((chips <= 4 ? 1 : chips / 4)) ;;
  esac
}

# The image of a TPU VM.
runtime_of() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

# The value of a flag among arguments, of `--flag value` and `--flag=value`; empty where it is not there.
value_of() {
  local flag=$1 found=''
  shift
  while (($#)); do
    case $1 in
      "$flag") found=${2:-} ;;
      "$flag"=*) found=${1#*=} ;;
    esac
    shift
  done
  echo "$found"
}

# Seconds from SIGTERM to the end: the step in progress and the one after it (several hosts agree on one that none has
# reached), a save that may be under way, the last save, and a margin to start and to leave.
grace_of() {
  local save=$1 step=$2
  [[ $save =~ ^(0|[1-9][0-9]*)$ && $step =~ ^(0|[1-9][0-9]*)$ ]] || fail "seconds of a save and of a step are whole numbers, not $save, $step"
  echo $((2 * step + 2 * save + 30))
}

# A mounted bucket commits a checkpoint by renaming its folder, which only a hierarchical namespace can.
check_namespace() {
  local found
  found=$(gcloud storage buckets describe "gs://$1" --raw --format='value(hierarchicalNamespace.enabled)') ||
    fail "bucket gs://$1 cannot be described"
  [[ ${found,,} == true ]] ||
    fail "bucket gs://$1 has no hierarchical namespace, so a mount of it cannot rename folders: give --workdir as gs://$1/... without FUSE, or make the bucket with --uniform-bucket-level-access --enable-hierarchical-namespace"
}

# What supervise runs before the training command that the arguments are: DOCTOR=short (the default), full, or no. In an
# array `first`: the flag and its words, or nothing.
# shellcheck disable=SC2034
doctor_first() {
  local words=(.venv/bin/baichuan-omni doctor)
  first=()
  case ${DOCTOR:-short} in
    no) return 0 ;;
    short) words+=(--short) ;;
    full) ;;
    *) fail "DOCTOR=$DOCTOR is none of short, full and no" ;;
  esac
  words+=(--workdir "$(value_of --workdir "$@")")
  [[ " $* " != *" --multihost "* ]] || words+=(--multihost)
  first=(--first "${SRUN:-}$(quoted "${words[@]}")")
}

# Waits for process $1 and sets `code`, in a script whose trap sets `interrupted`: `wait` returns early at each signal,
# and says 127 once it has given a code away.
# shellcheck disable=SC2034
wait_for() {
  local found
  code=127
  while true; do
    interrupted=''
    wait "$1"
    found=$?
    ((found == 127)) || code=$found
    [[ -n $interrupted ]] || break
  done
}
