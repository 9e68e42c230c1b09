"""Description of a model -> facts about every parameter that a rank will hold, in Megatron's order.

Imports ``partition``, ``parallel`` and ``models``. The facts are those that ``mcore/param_info``
finds in the real model: names, shapes, roles, tensor-parallel split (``tests/test_memory.py``
compares them with a model that Megatron builds).
"""

from __future__ import annotations

from megatron_adam_mini.estimate.models import Model
from megatron_adam_mini.estimate.parallel import Parallel, flag, stage_layers
from megatron_adam_mini.plan.parameter_info import HeadGeometry, ParameterInfo, num_stacked

EMBEDDING = "embedding.word_embeddings.weight"


def stage_parameters(
    model: Model,
    parallel: Parallel,
    *,
    pp_rank: int,
    tp_rank: int = 0,
    expert_tp_rank: int = 0,
) -> list[list[ParameterInfo]]:
    """Return the parameters of each virtual stage of one rank, in the model's own order.

    Raises:
        ValueError: the layout does not divide the model's sizes.
    """
    check_fits(model, parallel)
    stages = stage_layers(parallel, model.num_layers)
    chunks = stages[pp_rank]
    found = []
    for number, layers in enumerate(chunks):
        first = pp_rank == 0 and number == 0
        last = pp_rank == parallel.pp - 1 and number == len(chunks) - 1
        chunk = _Chunk(model, parallel, tp_rank, expert_tp_rank)
        chunk.add_all(layers, first=first, last=last)
        found.append(chunk.found)
    return found


def check_fits(model: Model, parallel: Parallel) -> None:
    """Check that tensor and expert parallelism divide the model's sizes.

    Raises:
        ValueError: it does not; names the sizes and the flags to change.
    """
    tp, etp, ep = parallel.tp, parallel.etp, parallel.expert_model_parallel_size
    sizes = [
        ("--num-attention-heads", model.num_attention_heads, "tensor_model_parallel_size", tp),
        ("the padded vocabulary", model.vocabulary(tp), "tensor_model_parallel_size", tp),
    ]
    if not all(model.expert_layers):
        sizes.append(("--ffn-hidden-size", model.ffn, "tensor_model_parallel_size", tp))
    if model.num_experts is not None:
        expert_ffn = model.moe_ffn_hidden_size or model.ffn
        shared = model.moe_shared_expert_intermediate_size
        sizes += [
            ("--num-experts", model.num_experts, "expert_model_parallel_size", ep),
            ("--moe-ffn-hidden-size", expert_ffn, "expert_tensor_parallel_size", etp),
        ]
        if shared:
            name = "--moe-shared-expert-intermediate-size"
            sizes.append((name, shared, "tensor_model_parallel_size", tp))
    elif parallel.experts_have_own_groups:
        raise ValueError(
            f"--expert-model-parallel-size={ep} and --expert-tensor-parallel-size={etp} are for "
            "experts, and the model has none; leave them out or give --num-experts."
        )
    for what, size, name, ranks in sizes:
        if size % ranks:
            raise ValueError(
                f"{what}={size} is not divisible by {flag(name)}={ranks}; choose a divisor."
            )
    groups = model.heads.num_query_groups
    if groups % tp and tp % groups:
        raise ValueError(
            f"--num-query-groups={groups} must be a multiple or a divisor of "
            f"--tensor-model-parallel-size={tp}; change one of them."
        )


class _Chunk:
    """Parameters of one virtual stage of one rank, in the order of ``named_parameters``."""

    def __init__(self, model: Model, parallel: Parallel, tp_rank: int, expert_tp_rank: int) -> None:
        self.model = model
        self.parallel = parallel
        self.tp_rank = tp_rank
        self.expert_tp_rank = expert_tp_rank
        self.engine = model.transformer_impl == "transformer_engine"
        self.found: list[ParameterInfo] = []

    def add_all(self, layers: range, *, first: bool, last: bool) -> None:
        model = self.model
        embedding = (model.vocabulary(self.parallel.tp), model.hidden_size)
        predicts = last and model.mtp_num_layers is not None
        if first or predicts:
            # Multi-token prediction embeds tokens on the last stage, with a copy of the weight.
            self._add(EMBEDDING, embedding, 0, shared=not first)
            if model.position_embedding_type == "learned_absolute":
                assert model.max_position_embeddings is not None
                shape = (model.max_position_embeddings, model.hidden_size)
                self._add("embedding.position_embeddings.weight", shape)
        for layer in layers:
            self._layer(f"decoder.layers.{layer}.", model.expert_layers[layer])
        if last:
            self._norm("decoder.final_layernorm.", model.hidden_size)
            for depth in range(model.mtp_num_layers or 0):
                self._prediction(f"mtp.layers.{depth}.")
            if model.untie_embeddings_and_output_weights:
                self._add("output_layer.weight", embedding, 0)
            elif predicts and not first:
                # The copy of the embedding is used instead, but the weight is there.
                self._add("output_layer.weight", embedding, 0)
            elif not first:
                # Megatron names the copy output_layer.weight; both are one parameter.
                self._add(EMBEDDING, embedding, 0, shared=True)

    def _prediction(self, name: str) -> None:
        """Add one depth of multi-token prediction, whose layer is like the decoder's last one."""
        hidden = self.model.hidden_size
        self._norm(name + "enorm.", hidden)
        self._norm(name + "hnorm.", hidden)
        self._linear(name + "eh_proj.", (hidden, 2 * hidden), 0, bias=False)
        self._layer(name + "mtp_model_layer.", self.model.expert_layers[-1])
        self._norm(name + "final_layernorm.", hidden)

    def _layer(self, name: str, experts: bool) -> None:
        fused = self.engine  # norms are part of the next linear layer
        if not fused or self.model.multi_latent_attention:
            self._norm(name + "input_layernorm.", self.model.hidden_size)
        if self.model.multi_latent_attention:
            self._latent_attention(name + "self_attention.")
        else:
            self._attention(name + "self_attention.", fused)
        if not fused or experts:
            self._norm(name + "pre_mlp_layernorm.", self.model.hidden_size)
        if experts:
            self._experts(name + "mlp.")
        else:
            self._mlp(name + "mlp.", self.model.ffn, fused_norm=fused)

    def _attention(self, name: str, fused: bool) -> None:
        model, heads = self.model, self.model.heads
        query = heads.num_heads * heads.head_dim
        self._linear(name + "linear_proj.", (model.hidden_size, query), 1)
        if fused:
            self._norm(name + "linear_qkv.layer_norm_", model.hidden_size)
        bias = model.add_bias_linear or model.add_qkv_bias
        self._linear(name + "linear_qkv.", (heads.num_rows, model.hidden_size), 0, bias=bias)
        if model.qk_layernorm:
            self._norm(name + "q_layernorm.", heads.head_dim)
            self._norm(name + "k_layernorm.", heads.head_dim)

    def _latent_attention(self, name: str) -> None:
        model = self.model
        heads, hidden = model.num_attention_heads, model.hidden_size
        query = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
        key_value = heads * (model.qk_head_dim + model.v_head_dim)
        # Transformer Engine's down projections are replicated on every tensor-parallel rank.
        down = None if self.engine else 0
        fused = self.engine and model.qk_layernorm
        self._linear(name + "linear_proj.", (hidden, heads * model.v_head_dim), 1)
        if model.q_lora_rank is None:
            self._linear(name + "linear_q_proj.", (query, hidden), 0, bias=False)
        else:
            shape = (model.q_lora_rank, hidden)
            self._linear(name + "linear_q_down_proj.", shape, down, bias=False)
            if fused:
                self._norm(name + "linear_q_up_proj.layer_norm_", model.q_lora_rank)
            self._linear(name + "linear_q_up_proj.", (query, model.q_lora_rank), 0, bias=False)
        shape = (model.kv_lora_rank + model.qk_pos_emb_head_dim, hidden)
        self._linear(name + "linear_kv_down_proj.", shape, down, bias=False)
        if fused:
            self._norm(name + "linear_kv_up_proj.layer_norm_", model.kv_lora_rank)
        self._linear(name + "linear_kv_up_proj.", (key_value, model.kv_lora_rank), 0, bias=False)
        if model.qk_layernorm and not fused:
            if model.q_lora_rank is not None:
                self._norm(name + "q_layernorm.", model.q_lora_rank)
            self._norm(name + "kv_layernorm.", model.kv_lora_rank)

    def _mlp(self, name: str, ffn: int, *, fused_norm: bool = False, expert: bool = False) -> None:
        model = self.model
        if fused_norm:
            self._norm(name + "linear_fc1.layer_norm_", model.hidden_size)
        rows = 2 * ffn if model.swiglu else ffn
        self._linear(name + "linear_fc1.", (rows, model.hidden_size), 0, expert=expert)
        self._linear(name + "linear_fc2.", (model.hidden_size, ffn), 1, expert=expert)

    def _experts(self, name: str) -> None:
        model = self.model
        assert model.num_experts is not None
        self._add(name + "router.weight", (model.num_experts, model.hidden_size))
        if model.add_bias_linear:
            self._add(name + "router.bias", (model.num_experts,))
        ffn = model.moe_ffn_hidden_size or model.ffn
        count = model.num_experts // self.parallel.expert_model_parallel_size
        if model.moe_grouped_gemm and self.engine:
            rows = 2 * ffn if model.swiglu else ffn
            for linear, shape, split in (
                ("linear_fc1", (rows, model.hidden_size), 0),
                ("linear_fc2", (model.hidden_size, ffn), 1),
            ):
                for part in ("weight", "bias") if model.add_bias_linear else ("weight",):
                    whole = shape if part == "weight" else shape[:1]
                    dim = None if part == "bias" and split == 1 else split
                    for expert in range(count):
                        full = f"{name}experts.{linear}.{part}{expert}"
                        self._add(full, whole, dim, expert=True)
        else:
            for expert in range(count):
                self._mlp(f"{name}experts.local_experts.{expert}.", ffn, expert=True)
        if model.moe_shared_expert_intermediate_size:
            if model.moe_shared_expert_gate:
                self._add(name + "shared_experts.gate_weight", (1, model.hidden_size))
            self._mlp(name + "shared_experts.", model.moe_shared_expert_intermediate_size)

    def _norm(self, prefix: str, size: int) -> None:
        self._add(prefix + "weight", (size,))
        if self.model.normalization == "LayerNorm":
            self._add(prefix + "bias", (size,))

    def _linear(
        self,
        prefix: str,
        shape: tuple[int, int],
        split: int | None,
        *,
        bias: bool | None = None,
        expert: bool = False,
    ) -> None:
        self._add(prefix + "weight", shape, split, expert=expert)
        if self.model.add_bias_linear if bias is None else bias:
            # The bias of a row-parallel layer is added after the sum, so it is replicated.
            self._add(prefix + "bias", shape[:1], 0 if split == 0 else None, expert=expert)

    def _add(
        self,
        name: str,
        shape: tuple[int, ...],
        split: int | None = None,
        *,
        expert: bool = False,
        shared: bool = False,
    ) -> None:
        size, rank = (
            (self.parallel.etp, self.expert_tp_rank) if expert else (self.parallel.tp, self.tp_rank)
        )
        self.found.append(
            ParameterInfo.of(
                name,
                tuple(n // size if dim == split else n for dim, n in enumerate(shape)),
                lambda role: HeadGeometry.of(self.model, role),
                num_stacked=num_stacked(name, gated=self.model.swiglu),
                tp_dim=split,
                tp_size=size,
                tp_rank=rank,
                expert=expert and self.parallel.experts_have_own_groups,
                in_norm=not shared and (split is not None or rank == 0),
            )
        )
