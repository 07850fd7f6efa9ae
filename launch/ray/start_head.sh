#!/usr/bin/env bash
# Starts the head of a Ray cluster on this host and stays until it is stopped.
#
#   RAY_AUTH_TOKEN=... launch/ray/start_head.sh [words of `ray start`]
#
# RAY_PORT: 6379 by default. The dashboard, which takes jobs, listens on the loopback: from another
# host through `ssh -L 8265:127.0.0.1:8265`, or with --dashboard-host. Ray finds GPUs and NPUs by
# itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/ray/common.sh
source "$here/common.sh"

unset RAY_ADDRESS # that of the cluster that starts here
exec "${ray[@]}" start --head --block --port "${RAY_PORT:-6379}" "$@"
