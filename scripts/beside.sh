#!/usr/bin/env bash
# beside.sh PATIENT COMMAND: runs COMMAND, and PATIENT in what that leaves of the processors. Shows in the end what PATIENT
# said. Fails if either does; ended early, it ends PATIENT with all that it started.
set -uo pipefail
patient_command=${1:?usage: beside.sh PATIENT COMMAND} command=${2:?usage: beside.sh PATIENT COMMAND}
said=$(mktemp) patient=
trap 'kill -- "-$patient" 2>/dev/null; rm -f "$said"' EXIT
trap 'exit 130' INT TERM

# A session of its own: where Linux has autogroups, it weighs sessions, and `nice` says nothing between two of them.
setsid nice -n 19 bash -c '{ echo 19 >/proc/self/autogroup; } 2>/dev/null; eval "$0"' "$patient_command" >"$said" 2>&1 &
patient=$!

bash -c "$command"
status=$?
wait "$patient"
patient_status=$?
cat "$said"
exit $((status ? status : patient_status))
