# shellcheck shell=bash disable=SC2034 # read by train.sh
# A model of DeepSeek-V3's sizes with multi-token prediction, at 4,096 tokens. TP 2, PP 16, EP 64 on 1,024 GPUs is what
# Megatron-Bridge recommends for H100. Its paper kept m and v in bfloat16; here m is, with unbiased rounding, and v is
# one number per block. Half of its learning rate (2.2e-4).
NODES=128
TP=${TP:-2} PP=${PP:-16} CP=${CP:-1} EP=${EP:-64}
LAST_LAYERS=${LAST_LAYERS:-1} # of 61: PP - 1 must divide the others. This stage has the prediction and the loss, too
MODEL=(
    --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128
    --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64
    --v-head-dim 128 --qk-layernorm
    --position-embedding-type rope --max-position-embeddings 4096 --normalization RMSNorm --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --vocab-size 129280
    --num-experts 256 --moe-ffn-hidden-size 2048 --moe-shared-expert-intermediate-size 2048
    --moe-layer-freq "([0]*3+[1]*58)" --moe-grouped-gemm --moe-router-topk 8 --mtp-num-layers 1
)
LAYOUT=(
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
    --decoder-last-pipeline-num-layers "$LAST_LAYERS"
    --expert-model-parallel-size "$EP" --expert-tensor-parallel-size 1
    --adam-mini-preset row # heads of latent attention are bad blocks, see docs/partition.md
)
TRAINING=(
    --moe-router-num-groups 8 --moe-router-group-topk 4 --moe-router-score-function sigmoid
    --moe-router-topk-scaling-factor 2.5 --moe-router-pre-softmax --moe-router-dtype fp32
    --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4
    --moe-token-dispatcher-type alltoall --moe-permute-fusion --mtp-loss-scaling-factor 0.3
    --rotary-base 10000 --rotary-scaling-factor 1.0 --mscale 1.0 --mscale-all-dim 1.0
    --seq-length 4096 --norm-epsilon 1e-6 --init-method-std 0.006
    --recompute-granularity selective --recompute-modules mla_up_proj layernorm moe_act
    --tokenizer-type HuggingFaceTokenizer
    --train-iters "${TRAIN_ITERS:-880000}" --micro-batch-size 1 --global-batch-size 4096
    --lr 1.1e-4 --min-lr 1.1e-5 --lr-warmup-iters 2000
    --adam-mini-lean # 16-bit remainders, bf16 m with stochastic rounding
)
