"""Description of a model by Megatron's flags, and presets of known models.

Imports ``partition`` and ``parallel``. Data flow: flags or the name of a preset -> **Model**
-> ``stages``.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_adam_mini.estimate.parallel import flag
from megatron_adam_mini.plan.parameter_info import HeadGeometry

TRANSFORMER_IMPLS = ("transformer_engine", "local")
NORMALIZATIONS = ("LayerNorm", "RMSNorm")
#: Of these, only learned positions have parameters.
POSITIONS = ("learned_absolute", "rope", "yarn", "mrope", "none")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{flag(name)}={value!r} is not known; allowed: {', '.join(allowed)}.")


def _frequency(text: str) -> int | list[int]:
    """Read ``N`` or a list expression of integers, ``+`` and ``*``, like ``--moe-layer-freq``."""

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
    """A GPT-like model; attributes have the names and defaults of Megatron's arguments.

    Raises:
        ValueError: Megatron would refuse a value or silently ignore it.
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
    moe_router_topk: int = 2
    mtp_num_layers: int | None = None
    transformer_impl: str = "transformer_engine"

    def __post_init__(self) -> None:
        """Check values and their combinations."""
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
        if self.group_query_attention and self.num_query_groups is None:
            # The flag's default; in Megatron's config None means one group for each head.
            object.__setattr__(self, "num_query_groups", 1)
        if self.group_query_attention and self.multi_latent_attention:
            raise ValueError(
                "--group-query-attention and --multi-latent-attention exclude each other in "
                "Megatron; give one of them."
            )
        if self.num_attention_heads % self.heads.num_query_groups:
            raise ValueError(
                f"--num-attention-heads={self.num_attention_heads} is not divisible by "
                f"--num-query-groups={self.heads.num_query_groups}; choose numbers that are."
            )
        if self.num_experts is None and (
            self.moe_ffn_hidden_size or self.moe_shared_expert_intermediate_size
        ):
            raise ValueError("Sizes of experts are given without --num-experts; add it.")
        _ = self.expert_layers

    @cached_property
    def heads(self) -> HeadGeometry:
        """Head geometry of the fused Query, Key and Value weight."""
        return HeadGeometry.of(self)

    @property
    def ffn(self) -> int:
        """Inner size of a dense MLP; Megatron's default depends on its activation."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return 4 * self.hidden_size * 2 // 3 // 64 * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def active_ffn(self) -> int:
        """Inner size of all MLPs that work on one token, in the layer where it is largest."""
        if self.num_experts is None:
            return self.ffn
        routed = self.moe_router_topk * (self.moe_ffn_hidden_size or self.ffn)
        experts = routed + (self.moe_shared_expert_intermediate_size or 0)
        return experts if all(self.expert_layers) else max(experts, self.ffn)

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
        """Return the number of rows of the embedding, with Megatron's padding."""
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
#: not parameters.
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
        moe_router_topk=8,
    ),
}
