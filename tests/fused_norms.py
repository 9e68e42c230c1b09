"""A layer spec whose parameters have the names that Transformer Engine's layers give them.

Transformer Engine, which cannot run here, puts the norm into the linear layer after it: its weight
is ``linear_qkv.layer_norm_weight``, and Megatron's local layers store ``input_layernorm.weight``
under that key. This stand-in does the same with Megatron's own linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMS norm, then Megatron's linear layer, as ``TELayerNormColumnParallelLinear`` is."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(input_size, dtype=config.params_dtype)
        )
        self.eps = config.layernorm_epsilon

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shape, weight = input_.shape[-1:], self.layer_norm_weight
        normed = torch.nn.functional.rms_norm(input_, shape, weight, self.eps)
        return super().forward(normed, *args, **kwargs)


def fused_norm_layer_spec() -> ModuleSpec:
    """Return Megatron's local layer with both norms in the linear layers after them."""
    parts = get_gpt_layer_local_submodules(normalization="RMSNorm")
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    parts.self_attention.submodules.linear_qkv = NormColumnParallelLinear
    parts.mlp.keywords["submodules"].linear_fc1 = NormColumnParallelLinear
    parts.sharded_state_dict_keys_map = {}
    return ModuleSpec(module=TransformerLayer, submodules=parts)
