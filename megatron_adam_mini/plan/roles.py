"""Name of a parameter -> what it is.

Standard library only, so that offline tools know roles without Megatron. Data flow:
mcore/param_info and convert/keys ask here; ``partition`` turns roles into rules.
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

_NORM_WEIGHT = re.compile(r"(norm\w*\.weight|\.layer_norm_weight)$")


def role_of(name: str, num_dimensions: int) -> str:
    """Return the role of a parameter: a key of the rule table, or ``"unknown"``.

    Args:
        name: name in the whole model.
        num_dimensions: dimensions of one layer's tensor.
    """
    if num_dimensions == 1:
        if _NORM_WEIGHT.search(name):
            return "norm"
        return "bias" if name.endswith("bias") else "unknown"
    if num_dimensions == 2:
        for suffix, role in _MATRIX_ROLES:
            if name.endswith(suffix):
                return role
    return "unknown"
