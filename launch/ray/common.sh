# shellcheck shell=bash
# Sourced by the scripts of this folder: a Ray cluster runs code for whoever reaches it, so none
# goes without a token.

token_file="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "$token_file" ]; then
    echo "error: no token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file;" \
        "ray get-auth-token --generate writes $HOME/.ray/auth_token" >&2
    exit 2
fi
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"

ray=(ray)
if [ -n "${MOPD_PYTHON:-}" ]; then
    ray=("$MOPD_PYTHON" -m ray.scripts.scripts)
fi
