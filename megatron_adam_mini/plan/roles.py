"""Name of a parameter -> its role.

Standard library only, so tools without Megatron can use it. Data flow: mcore/param_info,
convert/blocks and estimate/stages collect names -> **role** -> ``partition`` turns it into a rule.
"""

from __future__ import annotations

import re

#: Name suffix -> role, for parameters with two dimensions. First match wins.
_MATRIX_ROLES = (
    ("word_embeddings.weight", "embedding"),
    ("position_embeddings.weight", "position_embedding"),
    ("output_layer.weight", "output"),
    ("self_attention.linear_qkv.weight", "qkv"),
    ("self_attention.linear_proj.weight", "attention_projection"),
    ("mlp.linear_fc1.weight", "mlp"),
    ("mlp.linear_fc2.weight", "mlp"),
    ("mlp.router.weight", "router"),
)

#: What an expert's name contains and a dense MLP's does not: shared experts, one module for each
#: expert (SequentialMLP), one for all of them (grouped GEMM).
_EXPERT = re.compile(r"\.(?:shared_experts|experts(?:\.local_experts\.\d+)?)\.")
#: A grouped GEMM numbers its experts' weights and biases.
_GROUPED = re.compile(r"(weight|bias)\d+$")
_NORM_WEIGHT = re.compile(r"(norm\w*\.weight|\.layer_norm_weight)$")


def role_of(name: str, num_dimensions: int) -> str:
    """Return the role of a parameter: a key of the rule table, or ``"unknown"``.

    Args:
        name: name in the whole model. A parameter of an expert has the role of its counterpart in
            a dense MLP.
        num_dimensions: number of dimensions of one layer's tensor.
    """
    if _EXPERT.search(name):
        name = _GROUPED.sub(r"\1", _EXPERT.sub(".", name))
    if num_dimensions == 1:
        if _NORM_WEIGHT.search(name):
            return "norm"
        return "bias" if name.endswith("bias") else "unknown"
    if num_dimensions == 2:
        for suffix, role in _MATRIX_ROLES:
            if name.endswith(suffix):
                return role
    return "unknown"


def is_expert(name: str) -> bool:
    """Return whether a parameter belongs to a routed expert.

    Shared experts process every token and are reduced like dense parameters, so they do not count.
    """
    return ".experts." in name
