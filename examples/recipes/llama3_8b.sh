# shellcheck shell=bash disable=SC2034 # read by train.sh
# Llama-3-8B at 8,192 tokens, 4M tokens per step. Two ranks share a sequence (CP 2), as in Megatron-Bridge's recipe for
# eight H100. Half of AdamW's learning rate (3e-4 in the model's paper), because good rates of Adam-mini end earlier.
NODES=2
TP=${TP:-1} PP=${PP:-1} CP=${CP:-2}
MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8
    --position-embedding-type rope --max-position-embeddings 8192 --normalization RMSNorm --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --vocab-size 128256
)
LAYOUT=(
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
)
TRAINING=(
    --seq-length 8192 --rotary-base 500000 --norm-epsilon 1e-5 --init-method-std 0.02
    --tokenizer-type HuggingFaceTokenizer
    --train-iters "${TRAIN_ITERS:-250000}" --micro-batch-size 1 --global-batch-size 512
    --lr 1.5e-4 --min-lr 1.5e-5 --lr-warmup-iters 2000
    --adam-mini-param-remainders # changes no bit of the training
)
