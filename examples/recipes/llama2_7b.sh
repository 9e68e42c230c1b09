# shellcheck shell=bash disable=SC2034 # read by train.sh
# Llama-2-7B with the schedule of the Adam-mini paper for such models: AdamW's learning rate, 1 % of the steps to warm
# up, 4M tokens per step.
NODES=4
TP=${TP:-4} PP=${PP:-1} CP=${CP:-1}
TRAIN_ITERS=${TRAIN_ITERS:-250000}
MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32
    --position-embedding-type rope --max-position-embeddings 4096 --normalization RMSNorm --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --vocab-size 32000
)
LAYOUT=(
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
)
TRAINING=(
    --seq-length 4096 --norm-epsilon 1e-5 --init-method-std 0.02
    --tokenizer-type Llama2Tokenizer
    --train-iters "$TRAIN_ITERS" --micro-batch-size 2 --global-batch-size 1024
    --lr 3e-4 --min-lr 3e-5 --lr-warmup-iters $((TRAIN_ITERS / 100))
)
