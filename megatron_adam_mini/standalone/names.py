"""Name of a plain PyTorch parameter -> what it is: role, parts of attention, orientation.

Imports ``plan.roles`` only. Knows the names that Llama, Qwen, Mistral, GPT-2, Phi-3, BERT and
mixtures of experts have in transformers, those of torchtitan's Llama, of nanoGPT, of
``nn.TransformerEncoderLayer``, and Megatron-Core's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

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
        transposed: whether output neurons are the last dimension, not the one before it.
        stacked: whether it may hold several matrices, one after the other, such as gate and up.
        experts: whether dimension 0 counts experts, and each has a matrix in the other two.
    """

    role: str
    parts: tuple[str, ...] = ()
    interleaved: bool = False
    transposed: bool = False
    stacked: bool = False
    experts: bool = False

    @property
    def row_dims(self) -> tuple[int, ...]:
        """Dimensions whose indices say which output neuron an element belongs to."""
        if self.experts:
            return (0, 2) if self.transposed else (0, 1)
        return (1,) if self.transposed else (0,)

    @property
    def column_dims(self) -> tuple[int, ...]:
        """Dimensions whose indices say which input an element belongs to."""
        return replace(self, transposed=not self.transposed).row_dims


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
#: Weights of GPT-2, which transformers stores transposed, but nanoGPT and CLIP do not.
_GPT2 = re.compile(r"\.(?:c_attn|c_proj|c_fc)\.weight$")
_GPT2_QKV = re.compile(r"\.attn\.(?:c_attn\.weight|in_proj_weight)$")
#: Weights of all experts of a layer, and those that have their output neurons in dimension 1:
#: torchtitan's (dimensions in the name: E experts, D model, F hidden) and JetMoE's.
_STACKED = re.compile(r"\.\w*experts?(?:\.[A-Za-z_]\w*)+$|\.(?:in|out)put_linear\.weight$")
_STACKED_ROWS = re.compile(r"\.experts\.w\d_E(?:FD|DF)$|\.(?:in|out)put_linear\.weight$")
_STACKED_BIAS = re.compile(r"experts\.\w+_proj_bias$")


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
        ValueError: fused QKV weights of one GPT-2 contradict each other in their orientation.
    """
    towers = _transposed_towers(shapes)
    found = {}
    for name, shape in shapes.items():
        if _GPT2.search(f".{name}") and len(shape) == 2:
            # Only the fused QKV weights of the same tower say which way round a c_proj is.
            turned = next((towers[tower] for tower in _towers(name) if tower in towers), None)
            found[name] = _UNKNOWN
            if turned is not None:
                found[name] = replace(_weight(name, 2), transposed=turned)
        elif _STACKED.search(f".{name}") and len(shape) == 3:
            turned = _experts_are_transposed(name, shapes)
            role = "unknown" if turned is None else "mlp"
            stacked = name.endswith("gate_up_proj")
            found[name] = Weight(role, transposed=bool(turned), stacked=stacked, experts=True)
        elif _STACKED_BIAS.search(name) and len(shape) == 2:
            found[name] = Weight("bias")
        else:
            found[name] = _weight(name, len(shape))
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


def _towers(name: str) -> Iterator[str]:
    """Yield what stands before a layer's number: of the innermost modules, then of outer ones."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        if parts[end].isdigit():
            yield ".".join(parts[:end])
    if not any(part.isdigit() for part in parts):
        yield ""


def _transposed_towers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, bool]:
    """Return, for each tower of GPT-2's names, whether its weights are ``(in, out)``."""
    towers: dict[str, dict[str, bool]] = {}
    for name, shape in shapes.items():
        if _GPT2_QKV.search(f".{name}") and len(shape) == 2 and shape[0] != shape[1]:
            towers.setdefault(next(_towers(name)), {})[name] = shape[0] < shape[1]
    for found in towers.values():
        if len(set(found.values())) > 1:
            raise ValueError(
                f"Adam-mini cannot tell whether weights of GPT-2 are stored transposed: {found} "
                "differ. Remedy: one optimizer for each of the models."
            )
    return {tower: next(iter(found.values())) for tower, found in towers.items()}


def _experts_are_transposed(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Return whether experts are ``(experts, in, out)``; ``None``: nothing tells.

    With hidden size H and intermediate size I, ``gate_up_proj`` of transformers is (2 I, H) beside
    a ``down_proj`` of (H, I), or (H, 2 I) beside (I, H): the two tell which. Separate ``up_proj``,
    whose shapes would not tell, are (I, H) in all its models.
    """
    if _STACKED_ROWS.search(f".{name}"):
        return False
    module, _, last = name.rpartition(".")
    gate_up, up, down = (
        shapes.get(f"{module}.{part}_proj", ())[1:] for part in ("gate_up", "up", "down")
    )
    if last in ("gate_up_proj", "down_proj") and len(gate_up) == len(down) == 2:
        if gate_up == (2 * down[1], down[0]):
            return False
        return True if gate_up == (down[1], 2 * down[0]) else None
    separate = last in ("gate_proj", "up_proj", "down_proj")
    return False if separate and len(up) == 2 and up == down[::-1] else None
