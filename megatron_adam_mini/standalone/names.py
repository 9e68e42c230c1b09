"""Name of a plain PyTorch parameter -> what it is: role, parts of attention, orientation.

Imports ``plan.roles`` only. Knows the names that Llama, Qwen, Mistral, GPT-2, Phi-3 and BERT have
in transformers, those of torchtitan's Llama, of nanoGPT, of ``nn.TransformerEncoderLayer``, and
Megatron-Core's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_adam_mini.plan.parameter_info import HEAD_PARTS
from megatron_adam_mini.plan.roles import role_of

#: What ``torch.compile`` and activation checkpointing put into the names of parameters.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class Weight:
    """What a parameter is.

    Attributes:
        role: a key of the rule table in ``plan.partition``, or ``"unknown"``.
        parts: of an attention weight: ``query``, ``key``, ``value`` in the order of its rows.
        interleaved: whether these repeat for each query group (Megatron), instead of coming one
            after the other.
        transposed: whether output neurons are columns.
        stacked: whether it may hold several matrices, one after the other, such as gate and up.
    """

    role: str
    parts: tuple[str, ...] = ()
    interleaved: bool = False
    transposed: bool = False
    stacked: bool = False

    @property
    def output_dim(self) -> int:
        """Dimension of the output neurons, of a matrix."""
        return 1 if self.transposed else 0


_QKV = ("query", "key", "value")
_UNKNOWN = Weight("unknown")

#: End of the name of a matrix -> what it is. First match wins.
_MATRICES = tuple(
    (re.compile(rf"\.(?:{pattern})$"), weight)
    for pattern, weight in (
        (r"(?:embed_tokens|wte|tok_embeddings|word_embeddings)\.weight", Weight("embedding")),
        (r"(?:wpe|position_embeddings)\.weight", Weight("position_embedding")),
        (r"token_type_embeddings\.weight", Weight("tokentype_embedding")),
        (r"lm_head\.weight", Weight("output")),
        (r"(?:q_proj|wq|self\.query)\.weight", Weight("query", ("query",))),
        (r"(?:k_proj|wk|self\.key)\.weight", Weight("key_value", ("key",))),
        (r"(?:v_proj|wv|self\.value)\.weight", Weight("key_value", ("value",))),
        (r"(?:attn\.c_attn\.weight|qkv_proj\.weight|in_proj_weight)", Weight("qkv", _QKV)),
        (
            r"(?:o_proj|wo|attn\.c_proj|attn\.out_proj|attention\.output\.dense)\.weight",
            Weight("attention_projection"),
        ),
        (r"(?:gate_proj|up_proj|down_proj|c_fc|mlp\.c_proj)\.weight", Weight("mlp")),
        (r"(?:gate_up_proj|linear_fc1)\.weight", Weight("mlp", stacked=True)),
        (r"(?:feed_forward|shared_experts?|experts\.\d+)\.w[123]\.weight", Weight("mlp")),
        (r"(?:intermediate\.dense|output\.dense|mlp\.fc[12])\.weight", Weight("mlp")),
        (r"layers\.\d+\.linear[12]\.weight", Weight("mlp")),
        (r"(?:mlp|moe|router|block_sparse_moe)\.(?:router|gate)\.weight", Weight("router")),
        (r"shared_expert_gate\.weight", Weight("router")),
    )
)
#: The output layer of Llama as Meta and torchtitan published it.
_OUTPUT = re.compile(r"^\.(?:model\.)?output\.weight$")
_NORM = re.compile(r"\.(?:\w*norm\w*|ln_\w+)\.weight$", re.IGNORECASE)
_BIAS = re.compile(r"(?:\.|_proj_)bias$")
#: Weights of GPT-2, which transformers stores transposed and nanoGPT does not.
_GPT2 = re.compile(r"\.(?:c_attn|c_proj|c_fc)\.weight$")
_GPT2_QKV = re.compile(r"\.attn\.c_attn\.weight$")


def bare(name: str) -> str:
    """Return a name without what wrappers put into it: ``module.`` of DDP, ``_orig_mod.``, ..."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def weights_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Weight]:
    """Return what each parameter of a model is.

    Args:
        shapes: bare name -> shape of the whole parameter.

    Raises:
        ValueError: fused QKV weights of GPT-2 contradict each other in their orientation.
    """
    transposed = _gpt2_is_transposed(shapes)
    found = {}
    for name, shape in shapes.items():
        weight = _weight(name, len(shape))
        if _GPT2.search(f".{name}") and len(shape) == 2:
            # Only a c_attn says which way round a c_proj is.
            weight = _UNKNOWN if transposed is None else _turned(weight, transposed)
        found[name] = weight
    return found


def _weight(name: str, num_dimensions: int) -> Weight:
    dotted = f".{name}"
    if num_dimensions == 2:
        for pattern, weight in _MATRICES:
            if pattern.search(dotted):
                return weight
        if _OUTPUT.search(dotted):
            return Weight("output")
    if num_dimensions == 1 and _NORM.search(dotted):
        return Weight("norm")
    if num_dimensions == 1 and _BIAS.search(dotted):
        return Weight("bias")
    role = role_of(name, num_dimensions) if num_dimensions <= 2 else "unknown"
    if role.startswith("latent_") and role in HEAD_PARTS:
        return _UNKNOWN  # its geometry takes more than three numbers
    return Weight(role, HEAD_PARTS.get(role, ()), interleaved=True)


def _turned(weight: Weight, transposed: bool) -> Weight:
    return Weight(weight.role, weight.parts, weight.interleaved, transposed)


def _gpt2_is_transposed(shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Return whether GPT-2's weights are ``(in, out)``; ``None``: no weight tells."""
    found = {
        name: shape[0] < shape[1]
        for name, shape in shapes.items()
        if _GPT2_QKV.search(f".{name}") and len(shape) == 2 and shape[0] != shape[1]
    }
    if len(set(found.values())) > 1:
        raise ValueError(
            f"Adam-mini cannot tell whether weights of GPT-2 are stored transposed: {found} "
            "differ. Remedy: one optimizer for each of the models."
        )
    return next(iter(found.values()), None)
