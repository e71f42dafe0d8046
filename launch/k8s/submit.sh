#!/usr/bin/env bash
# The common part of rayjob.sh and pytorchjob.sh: fill in the manifest, create the job, wait for its end. Exits with 0 if the run
# succeeded, and with 1 if it failed, was stopped, or no longer exists. Ctrl-C leaves the job running.
#
#     launch/k8s/submit.sh MANIFEST RECIPE [key=value ...]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: ${0%/*}/${1:-rayjob}.sh RECIPE [key=value ...]" >&2
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=python
[ ! -x "$here/../../.venv/bin/python" ] || python="$here/../../.venv/bin/python"
manifest=$here/$1.yaml
shift

job=$("$python" "$here/fill.py" "$manifest" "$@" | kubectl create -f - -o name)
echo "$job; its pods: kubectl get pods; its log: kubectl logs -f POD; to stop it: kubectl delete $job" >&2

# One of the two is empty for either kind of job
state='{.status.jobDeploymentStatus} {.status.jobStatus} {range .status.conditions[?(@.status=="True")]}{.type} {end}'
while :; do
    told=$(kubectl get "$job" -o "jsonpath=$state")
    case " $told " in
    *" SUCCEEDED "* | *" Succeeded "*) exit 0 ;;
    *" FAILED "* | *" STOPPED "* | *" Failed "*)
        echo "$job: $told" >&2
        exit 1
        ;;
    esac
    sleep 10
done
