# shellcheck shell=bash
# Sourced by train.sbatch and ray.sbatch, in the root of the repository.

# The interpreter that has mopd, the same path on every node.
if [ -z "${MOPD_PYTHON:-}" ]; then
    MOPD_PYTHON=python3
    [ -x .venv/bin/python ] && MOPD_PYTHON="$PWD/.venv/bin/python"
fi
export MOPD_PYTHON

case "${MOPD_DEVICE:-cuda}" in
    cuda | npu)
        # shellcheck source=/dev/null
        source "launch/env/${MOPD_DEVICE:-cuda}.sh"
        ;;
    cpu) ;;
    *)
        echo "error: MOPD_DEVICE=$MOPD_DEVICE is not known; choose cuda, npu or cpu" >&2
        exit 2
        ;;
esac

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# shellcheck disable=SC2034  # read by those who source this
head=${hosts%%$'\n'*}

# `wait` ends early at a signal that is trapped: ask until the process is gone. Sets `status`.
await() {
    local asked=$1
    while kill -0 "$asked" 2>/dev/null; do
        wait "$asked" || true
    done
    status=0
    wait "$asked" || status=$?
}

# The time limit ended the run, not an error: into the queue again, and the same command continues.
finish() {
    if [ "$status" -ne 0 ] && [ "$is_limit" -eq 1 ]; then
        echo "the time limit is near: queued again, to continue from the last checkpoint"
        scontrol requeue "$SLURM_JOB_ID" || true
    fi
    exit "$status"
}
