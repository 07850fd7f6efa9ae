#!/usr/bin/env bash
# Adds this host to a Ray cluster and stays until it is stopped. Tries until the head is there.
#
#   RAY_AUTH_TOKEN=... RAY_ADDRESS=10.0.0.1:6379 launch/ray/start_worker.sh [words of `ray start`]
#
# The token is the head's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/ray/common.sh
source "$here/common.sh"

address="${RAY_ADDRESS:-}"
if [ -z "$address" ]; then
    echo "error: RAY_ADDRESS is not set; set it to the head's host:port" >&2
    exit 2
fi
unset RAY_ADDRESS
deadline=$((SECONDS + ${MOPD_RAY_START_S:-300}))
until (exec 3<>"/dev/tcp/${address%:*}/${address##*:}") 2>/dev/null; do
    if [ "$SECONDS" -ge "$deadline" ]; then
        echo "error: nothing listens at $address; start the head first," \
            "or raise MOPD_RAY_START_S" >&2
        exit 1
    fi
    sleep 2
done
exec "${ray[@]}" start --address "$address" --block "$@"
