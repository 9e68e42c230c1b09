# shellcheck shell=bash disable=SC2034 # read by train.sh
# A model of Mixtral-8x7B's sizes, trained from scratch at 4,096 tokens. The layout is that of Megatron-LM's
# examples/mixtral: an expert is whole on its rank, and eight ranks hold one copy of all of them. So only DP / 8 ranks
# share the state of the experts, which are most of the model: here Adam-mini saves much.
NODES=8
TP=${TP:-1} PP=${PP:-4} CP=${CP:-1} EP=${EP:-8}
MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8
    --position-embedding-type rope --max-position-embeddings 32768 --normalization RMSNorm --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --vocab-size 32000
    --num-experts 8 --moe-ffn-hidden-size 14336 --moe-grouped-gemm --moe-router-topk 2
)
LAYOUT=(
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
    --expert-model-parallel-size "$EP" --expert-tensor-parallel-size 1
)
TRAINING=(
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-router-dtype fp32
    --moe-token-dispatcher-type alltoall --moe-permute-fusion
    --seq-length 4096 --rotary-base 1000000 --norm-epsilon 1e-5 --init-method-std 0.01
    --tokenizer-type Llama2Tokenizer
    --train-iters "${TRAIN_ITERS:-500000}" --micro-batch-size 1 --global-batch-size 256
    --lr 5e-5 --min-lr 5e-6 --lr-warmup-iters 500 # half of that example's rate
    --adam-mini-param-remainders # changes no bit of the training
)
