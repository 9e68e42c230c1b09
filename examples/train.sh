#!/usr/bin/env bash
# Pre-train a model with Adam-mini on nodes with GPUs: slurm/ and kubernetes/ start this script once on every node.
#
#   examples/train.sh RECIPE [FLAGS OF MEGATRON...]   train
#   examples/train.sh --plan RECIPE                   say what each rank will allocate; needs no GPU and no data
#
# RECIPE is a name in recipes/ or a file like those: it holds the model, its layout and its schedule. The layout
# changes with TP, PP, CP and EP, the number of ranks with NUM_NODES and GPUS_PER_NODE. A layout that does not fit the
# model or the ranks is refused before anything starts. Flags of Megatron come last, so they override the recipe's.
set -euo pipefail

EXAMPLES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

stop() {
    echo "train.sh: $*" >&2
    exit 2
}

PLAN_ONLY=false
if [[ ${1:-} == --plan ]]; then
    PLAN_ONLY=true
    shift
fi
RECIPE=${1:-}
[[ -f $RECIPE ]] || RECIPE=$EXAMPLES/recipes/$RECIPE.sh
if [[ ! -f $RECIPE ]]; then
    known=$(cd "$EXAMPLES/recipes" && echo *.sh)
    stop "there is no recipe '${1:-}'; name a file, or one of: ${known//.sh/}"
fi
(($# == 0)) || shift

# A recipe sets NODES (of 8 GPUs, for which its layout is meant), TP, PP, CP, MODEL, LAYOUT and TRAINING.
# shellcheck source=recipes/llama3_8b.sh
source "$RECIPE"
NUM_NODES=${NUM_NODES:-${SLURM_NNODES:-$NODES}}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
LAYOUT+=(--overlap-grad-reduce)

# What each rank will allocate, said once. It fails where Megatron would, with the flag to change.
plan=$(megatron-adam-mini memory "${MODEL[@]}" "${LAYOUT[@]}" --world-size $((NUM_NODES * GPUS_PER_NODE))) ||
    stop "$(basename "$RECIPE" .sh) does not fit TP $TP x PP $PP x CP $CP on $NUM_NODES nodes with $GPUS_PER_NODE GPUs"
((NODE_RANK > 0)) || printf '%s\n' "$plan"
! $PLAN_ONLY || exit 0

: "${MEGATRON_LM:?set MEGATRON_LM to a checkout of Megatron-LM core_v0.19.0}"
: "${TOKENIZER_MODEL:?set TOKENIZER_MODEL to the tokenizer of the model, as --tokenizer-model}"
: "${DATA_PATH:?set DATA_PATH to the prefix of an indexed dataset (without .bin or .idx)}"
CHECKPOINTS=${CHECKPOINTS:-checkpoints/$(basename "$RECIPE" .sh)}

COMMON=(
    --optimizer adam_mini --bf16 --use-distributed-optimizer --overlap-param-gather
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 0.1 --clip-grad 1.0 --lr-decay-style cosine
    --attention-dropout 0 --hidden-dropout 0 --no-create-attention-mask-in-dataloader
    --tokenizer-model "$TOKENIZER_MODEL" --data-path "$DATA_PATH" --split 99,1,0
    --save "$CHECKPOINTS" --load "$CHECKPOINTS" --save-interval 1000
    --eval-interval 1000 --eval-iters 10 --log-interval 10 --log-throughput
)
((TP == 1)) || COMMON+=(--sequence-parallel)
# The order of kernels in which Megatron overlaps communication; it refuses another before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Where kernels are compiled to: on the node's own disk, because the home directory may be one for all nodes.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$(id -u)}
export PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"

exec torchrun --nnodes "$NUM_NODES" --nproc-per-node "$GPUS_PER_NODE" --node-rank "$NODE_RANK" \
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" \
    -m megatron_adam_mini.launch "$MEGATRON_LM/pretrain_gpt.py" \
    "${MODEL[@]}" "${LAYOUT[@]}" "${COMMON[@]}" "${TRAINING[@]}" "$@"
