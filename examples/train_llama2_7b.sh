#!/usr/bin/env bash
# Pre-train Llama-2-7B with Adam-mini on several nodes with GPUs. Start it once on every node, for example with
#
#   srun --nodes 4 --ntasks-per-node 1 examples/train_llama2_7b.sh
#
# or by hand with NODE_RANK=0..NUM_NODES-1 and the same MASTER_ADDR everywhere. It needs a checkout of Megatron-LM
# (core_v0.19.0; MEGATRON_LM), Llama's tokenizer (TOKENIZER_MODEL) and a dataset in Megatron's indexed format (DATA_PATH,
# without .bin or .idx). The recipe is that of the Adam-mini paper for Llama-2-7B-like models: betas 0.9 and 0.95, weight
# decay 0.1, eps 1e-8, clipping at 1.0, 1 % of the steps to warm up.
set -euo pipefail

: "${MEGATRON_LM:?set MEGATRON_LM to a checkout of Megatron-LM core_v0.19.0}"
: "${TOKENIZER_MODEL:?set TOKENIZER_MODEL to the tokenizer.model of Llama 2}"
: "${DATA_PATH:?set DATA_PATH to the prefix of an indexed dataset}"
CHECKPOINTS=${CHECKPOINTS:-checkpoints/llama2-7b-adam-mini}

# Ranks: one process per GPU, GPUS_PER_NODE x NUM_NODES = TP x PP x DP.
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}

# Layout: the remaining factor of the ranks is data parallelism.
TP=${TP:-4}
PP=${PP:-1}
WORLD_SIZE=$((GPUS_PER_NODE * NUM_NODES))
if ((WORLD_SIZE % (TP * PP) != 0)); then
    echo "TP x PP = $((TP * PP)) does not divide the $WORLD_SIZE GPUs (GPUS_PER_NODE x NUM_NODES)" >&2
    exit 2
fi
DP=$((WORLD_SIZE / (TP * PP)))

# Duration: 4M tokens per step.
TRAIN_ITERS=${TRAIN_ITERS:-250000}
MICRO_BATCH=${MICRO_BATCH:-2}
GLOBAL_BATCH=${GLOBAL_BATCH:-1024}
WARMUP_ITERS=$((TRAIN_ITERS / 100))

LAUNCH=(
    --nnodes "$NUM_NODES" --nproc-per-node "$GPUS_PER_NODE" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
)
MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32
    --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope
    --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --init-method-std 0.02
)
LAYOUT=(
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
if ((TP > 1)); then
    LAYOUT+=(--sequence-parallel)
    export CUDA_DEVICE_MAX_CONNECTIONS=1 # the order of kernels in which Megatron overlaps them
fi
OPTIMIZER=(
    --optimizer adam_mini --bf16
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters "$WARMUP_ITERS"
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 0.1 --clip-grad 1.0
)
TRAINING=(
    --train-iters "$TRAIN_ITERS" --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH"
    --tokenizer-type Llama2Tokenizer --tokenizer-model "$TOKENIZER_MODEL"
    --data-path "$DATA_PATH" --split 99,1,0
    --save "$CHECKPOINTS" --load "$CHECKPOINTS" --save-interval 1000
    --eval-interval 1000 --eval-iters 10 --log-interval 10 --log-throughput
)

echo "Llama-2-7B, Adam-mini: TP $TP x PP $PP x DP $DP on $NUM_NODES x $GPUS_PER_NODE GPUs"
export PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"
exec torchrun "${LAUNCH[@]}" -m megatron_adam_mini.launch "$MEGATRON_LM/pretrain_gpt.py" \
    "${MODEL[@]}" "${LAYOUT[@]}" "${OPTIMIZER[@]}" "${TRAINING[@]}" "$@"
