# shellcheck shell=bash
# Source this before a run on NVIDIA GPUs:  source launch/env/cuda.sh A variable that is set already
# keeps its value. Servers that a run starts get the same environment.

# Megatron's tensor parallelism counts on kernels starting in the order in which they were queued.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Ordinals as nvidia-smi counts them, so that device 4 of a plan is device 4 of the node.
export CUDA_DEVICE_ORDER="${CUDA_DEVICE_ORDER:-PCI_BUS_ID}"

# Models and tokenizers are directories: nothing is looked up on a hub.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# A tokenizer's threads and a process that forks do not go together.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Left alone, because they depend on the site: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (the
# network between nodes), NCCL_IB_HCA. Left alone as well:
# PYTORCH_ALLOC_CONF=expandable_segments:True, which older vLLM refuses together with its sleep
# mode, and engines that share a pool sleep.
