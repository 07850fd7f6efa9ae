# shellcheck shell=bash
# Source this before a run on Ascend NPUs:  source launch/env/npu.sh A variable that is set already
# keeps its value. Servers that a run starts get the same environment.

# CANN's own set_env.sh comes first: without it torch_npu does not find its libraries.
if [ -z "${ASCEND_HOME_PATH:-}" ]; then
    echo "launch/env/npu.sh: ASCEND_HOME_PATH is not set;" \
        "source the set_env.sh of your CANN toolkit first" >&2
fi

# Ranks reach their first collective at different times: some still read a model. 120 s is HCCL's
# default.
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1800}"

# Ranks wait in a collective while the lead samples and teachers score. Two minutes more
# than run.stall_s of recipes/cluster.yaml, so that the watchdog speaks first.
export HCCL_EXEC_TIMEOUT="${HCCL_EXEC_TIMEOUT:-7320}"

# As on GPUs: Megatron's tensor parallelism counts on kernels starting in the order in which they
# were queued.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Models and tokenizers are directories: nothing is looked up on a hub.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# A tokenizer's threads and a process that forks do not go together.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Left alone, because they depend on the site: HCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, the
# network between nodes.
