"""Description of a model -> facts about every parameter that a rank will hold, in Megatron's order.

Imports ``partition``, ``roles`` and ``parallel``. The description gives what ``mcore/param_info``
finds in the real model: names, shapes, roles, how they are split (a test compares the two).

Mixture-of-experts models can be described although the optimizer does not train them yet: a
weight of an expert follows the rule of the same weight of a dense MLP.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_adam_mini.partition import HeadGeometry, ParameterInfo
from megatron_adam_mini.planning.parallel import Parallel, flag, stage_layers
from megatron_adam_mini.roles import role_of

EMBEDDING = "embedding.word_embeddings.weight"
TRANSFORMER_IMPLS = ("transformer_engine", "local")
NORMALIZATIONS = ("LayerNorm", "RMSNorm")
#: Of these, only learned positions have parameters.
POSITIONS = ("learned_absolute", "rope", "yarn", "mrope", "none")

_EXPERT = re.compile(r"\.(?:shared_experts|experts(?:\.local_experts\.\d+)?)\.")
_GROUPED = re.compile(r"(weight|bias)\d+$")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{flag(name)}={value!r} is not known; allowed: {', '.join(allowed)}.")


def _frequency(text: str) -> int | list[int]:
    """Read ``N`` or a list expression of integers, ``+`` and ``*``, as ``--moe-layer-freq``."""

    def value(node: ast.expr) -> int | list[int]:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value >= 0:
            return node.value
        if isinstance(node, ast.List):
            return [entry for entry in map(value, node.elts) if isinstance(entry, int)]
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
                return left + right
            if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
                return left * right
        raise ValueError

    try:
        found = value(ast.parse(text.strip(), mode="eval").body)
        if found == 0:
            raise ValueError
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f"--moe-layer-freq={text!r} cannot be read; give a number of at least 1, or a list "
            "expression such as '([0]*3+[1]*58)'."
        ) from error
    return found


@dataclass(frozen=True, kw_only=True)
class Model:
    """A GPT-like model; attributes are named, and have defaults, as Megatron's arguments.

    Raises:
        ValueError: values that Megatron would not accept or would ignore in silence.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int | None = None
    padded_vocab_size: int | None = None
    make_vocab_size_divisible_by: int = 128
    max_position_embeddings: int | None = None
    position_embedding_type: str = "learned_absolute"
    untie_embeddings_and_output_weights: bool = False
    ffn_hidden_size: int | None = None
    swiglu: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    normalization: str = "LayerNorm"
    qk_layernorm: bool = False
    kv_channels: int | None = None
    group_query_attention: bool = False
    num_query_groups: int | None = None
    attention_output_gate: bool = False
    multi_latent_attention: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 32
    qk_head_dim: int = 128
    qk_pos_emb_head_dim: int = 64
    v_head_dim: int = 128
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_layer_freq: str = "1"
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_grouped_gemm: bool = False
    transformer_impl: str = "transformer_engine"

    def __post_init__(self) -> None:
        """Check values, and what depends on one another."""
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{flag(name)}={value} is not allowed; it must be at least 1.")
        _one_of("transformer_impl", self.transformer_impl, TRANSFORMER_IMPLS)
        _one_of("normalization", self.normalization, NORMALIZATIONS)
        _one_of("position_embedding_type", self.position_embedding_type, POSITIONS)
        if (self.vocab_size is None) == (self.padded_vocab_size is None):
            raise ValueError(
                f"--vocab-size={self.vocab_size} and --padded-vocab-size={self.padded_vocab_size}: "
                "give one of them (Megatron pads the first and takes the second as it is)."
            )
        if self.position_embedding_type == "learned_absolute" and not self.max_position_embeddings:
            raise ValueError(
                "Learned positions need --max-position-embeddings; give it, or another "
                f"--position-embedding-type ({', '.join(POSITIONS[1:])})."
            )
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"--hidden-size={self.hidden_size} is not divisible by --num-attention-heads="
                f"{self.num_attention_heads}; choose numbers that are, or give --kv-channels."
            )
        if self.num_query_groups is not None and not self.group_query_attention:
            raise ValueError(
                f"Megatron ignores --num-query-groups={self.num_query_groups} without "
                "--group-query-attention; add that, or leave the groups out."
            )
        if self.group_query_attention and self.multi_latent_attention:
            raise ValueError(
                "--group-query-attention and --multi-latent-attention exclude each other in "
                "Megatron; give one of them."
            )
        if self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"--num-attention-heads={self.num_attention_heads} is not divisible by "
                f"--num-query-groups={self.query_groups}; choose numbers that are."
            )
        if self.num_experts is None and (
            self.moe_ffn_hidden_size or self.moe_shared_expert_intermediate_size
        ):
            raise ValueError("Sizes of experts are given without --num-experts; add it.")
        _ = self.expert_layers

    @property
    def query_groups(self) -> int:
        """Number of Key and Value heads."""
        if self.group_query_attention:
            return self.num_query_groups or 1
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn(self) -> int:
        """Inner size of a dense MLP; Megatron's default depends on its activation."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return 4 * self.hidden_size * 2 // 3 // 64 * 64 if self.swiglu else 4 * self.hidden_size

    @cached_property
    def expert_layers(self) -> tuple[bool, ...]:
        """Whether each layer has experts."""
        if self.num_experts is None:
            return (False,) * self.num_layers
        frequency = _frequency(self.moe_layer_freq)
        if isinstance(frequency, int):
            return tuple(layer % frequency == 0 for layer in range(self.num_layers))
        if len(frequency) != self.num_layers or not set(frequency) <= {0, 1}:
            raise ValueError(
                f"--moe-layer-freq={self.moe_layer_freq!r} makes {len(frequency)} entries "
                f"{sorted(set(frequency))}; it must make one 0 or 1 for each of the "
                f"{self.num_layers} layers."
            )
        return tuple(entry == 1 for entry in frequency)

    def vocabulary(self, tp: int) -> int:
        """Return the rows of the embedding, padded as Megatron pads them."""
        if self.padded_vocab_size is not None:
            return self.padded_vocab_size
        assert self.vocab_size is not None
        multiple = self.make_vocab_size_divisible_by * tp
        return -(-self.vocab_size // multiple) * multiple


_LLAMA = Model(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    vocab_size=32000,
    position_embedding_type="rope",
    untie_embeddings_and_output_weights=True,
    swiglu=True,
    add_bias_linear=False,
    normalization="RMSNorm",
)
_LLAMA_3 = replace(_LLAMA, vocab_size=128256, group_query_attention=True, num_query_groups=8)

#: Public models by name. ``-like``: without multi-token prediction and without buffers that are
#: no parameters.
MODELS = {
    "llama-2-7b": _LLAMA,
    "llama-2-13b": replace(
        _LLAMA, num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40
    ),
    "llama-3-8b": replace(_LLAMA_3, ffn_hidden_size=14336),
    "llama-3-70b": replace(
        _LLAMA_3, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64
    ),
    "llama-3-405b": replace(
        _LLAMA_3, num_layers=126, hidden_size=16384, ffn_hidden_size=53248, num_attention_heads=128
    ),
    "mixtral-8x7b-like": replace(
        _LLAMA,
        ffn_hidden_size=14336,
        group_query_attention=True,
        num_query_groups=8,
        num_experts=8,
        moe_grouped_gemm=True,
    ),
    "deepseek-v3-like": replace(
        _LLAMA,
        num_layers=61,
        hidden_size=7168,
        ffn_hidden_size=18432,
        num_attention_heads=128,
        vocab_size=129280,
        qk_layernorm=True,
        multi_latent_attention=True,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_head_dim=128,
        qk_pos_emb_head_dim=64,
        v_head_dim=128,
        num_experts=256,
        moe_ffn_hidden_size=2048,
        moe_layer_freq="([0]*3+[1]*58)",
        moe_shared_expert_intermediate_size=2048,
        moe_grouped_gemm=True,
    ),
}


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
        ValueError: sizes that the layout does not divide.
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
        ValueError: with the sizes and the flags to change.
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
    groups = model.query_groups
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
        if first:
            self._add(EMBEDDING, embedding, 0)
            if model.position_embedding_type == "learned_absolute":
                assert model.max_position_embeddings is not None
                shape = (model.max_position_embeddings, model.hidden_size)
                self._add("embedding.position_embeddings.weight", shape)
        for layer in layers:
            self._layer(f"decoder.layers.{layer}.", model.expert_layers[layer])
        if last:
            self._norm("decoder.final_layernorm.", model.hidden_size)
            if model.untie_embeddings_and_output_weights:
                self._add("output_layer.weight", embedding, 0)
            elif not first:
                # Megatron calls the copy output_layer.weight; it is one parameter with the first.
                self._add(EMBEDDING, embedding, 0, shared=True)

    def _layer(self, name: str, experts: bool) -> None:
        fused = self.engine  # norms are part of the linear layer behind them
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
        model = self.model
        query = model.num_attention_heads * model.head_dim
        heads = self._heads()
        self._linear(name + "linear_proj.", (model.hidden_size, query), 1)
        if fused:
            self._norm(name + "linear_qkv.layer_norm_", model.hidden_size)
        bias = model.add_bias_linear or model.add_qkv_bias
        self._linear(name + "linear_qkv.", (heads.num_rows, model.hidden_size), 0, bias=bias)
        if model.qk_layernorm:
            self._norm(name + "q_layernorm.", model.head_dim)
            self._norm(name + "k_layernorm.", model.head_dim)

    def _latent_attention(self, name: str) -> None:
        model = self.model
        heads, hidden = model.num_attention_heads, model.hidden_size
        query = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
        key_value = heads * (model.qk_head_dim + model.v_head_dim)
        # Transformer Engine's down projections are whole on every tensor-parallel rank.
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
            # The bias of a row-parallel layer is added after the sum: it is whole everywhere.
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
        is_split = split is not None and size > 1
        role = _role(name, len(shape))
        self.found.append(
            ParameterInfo(
                name=name,
                shape=tuple(
                    length // size if is_split and dim == split else length
                    for dim, length in enumerate(shape)
                ),
                role=role,
                tp_dim=split if is_split else None,
                tp_size=size if is_split else 1,
                tp_rank=rank if is_split else 0,
                heads=self._heads() if role == "qkv" else None,
                expert=expert and self.parallel.experts_have_own_groups,
                in_norm=not shared and (split is not None or rank == 0),
            )
        )

    def _heads(self) -> HeadGeometry:
        return HeadGeometry(
            num_heads=self.model.num_attention_heads,
            num_query_groups=self.model.query_groups,
            head_dim=self.model.head_dim,
            gated=self.model.attention_output_gate,
        )


def _role(name: str, num_dimensions: int) -> str:
    role = role_of(name, num_dimensions)
    if role == "unknown" and _EXPERT.search(name):
        role = role_of(_GROUPED.sub(r"\1", _EXPERT.sub(".", name)), num_dimensions)
    return role
