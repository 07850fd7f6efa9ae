#!/usr/bin/env bash
# Submits a recipe as a job to a Ray cluster that is running, with this repository as its working
# directory, and follows its output.
#
#   export RAY_AUTH_TOKEN=... RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
#   export MOPD_RUNS=/shared/runs MOPD_MODELS=... MOPD_DATA=...
#   launch/ray/submit.sh recipe=gpu/qwen3_llama_8gpu_dedicated [key=value ...]
#
# MOPD_RUNS: a directory that every node sees. Ray unpacks the repository into a temporary one,
# where runs would be lost. MOPD_REMOTE_PYTHON: the cluster's interpreter with mopd's requirements,
# python by default. Needs ray[default] here and there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/ray/common.sh
source "$here/common.sh"

if [[ ${MOPD_RUNS:-} != /* ]]; then
    echo "error: MOPD_RUNS: expected an absolute path, got '${MOPD_RUNS:-}';" \
        "set it to a directory that every node sees" >&2
    exit 2
fi

# What recipes and their ranks read from the environment, as JSON; values may hold anything.
environment=$("${MOPD_PYTHON:-python3}" - <<'PYTHON'
import json
import os

names = ("MOPD_MODELS", "MOPD_DATA", "MOPD_VLLM_PYTHON", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
variables = {name: os.environ[name] for name in names if name in os.environ}
# files that git ignores stay here anyway
excludes = [".git", ".venv", ".venv-vllm", "runs", ".cache"]
print(json.dumps({"env_vars": variables, "excludes": excludes}))
PYTHON
)

cd "$here/../.."
exec "${ray[@]}" job submit --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" \
    --working-dir . --runtime-env-json "$environment" -- \
    "${MOPD_REMOTE_PYTHON:-python}" launch/train.py launcher=ray \
    "run.dir=$MOPD_RUNS" "cache_dir=$MOPD_RUNS/.cache" "$@"
