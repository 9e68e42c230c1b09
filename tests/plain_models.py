"""Small plain PyTorch models with the parameter names of well-known ones, and their blocks.

Names and shapes were read from transformers 5.24.0 and torchtitan (August 2026).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from tests.reference import WholeTensorAdamMini, element_labels, one_label, row_labels

#: Query heads, Key heads and rows of a head, of all models here.
HEADS, GROUPS, DIM = 4, 2, 4
HIDDEN, FFN, VOCAB = 16, 24, 12

HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
GEOMETRY = {"num_heads": HEADS, "num_query_groups": GROUPS}


def shapes_of_llama(layers: int = 1) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of Llama, Mistral or Qwen2 without biases in transformers."""
    query, key = HEADS * DIM, GROUPS * DIM
    layer = {
        "self_attn.q_proj.weight": (query, HIDDEN),
        "self_attn.k_proj.weight": (key, HIDDEN),
        "self_attn.v_proj.weight": (key, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, query),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    return {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        **{f"model.layers.{n}.{key}": shape for n in range(layers) for key, shape in layer.items()},
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }


def module_of(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """Return a module with the given parameters, which does not compute anything."""
    generator = torch.Generator().manual_seed(seed)
    root = nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        values = torch.randn(shape, generator=generator)
        module.register_parameter(last, nn.Parameter(values.to(dtype)))
    return root


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """Return a gradient whose scale differs from row to row and from column to column."""
    generator = torch.Generator().manual_seed(crc32(f"{name} {step}".encode()))
    values = torch.randn(shape, generator=generator)
    for dim, size in enumerate(shape):
        scale = torch.logspace(-1, 1, size) if size > 1 else torch.ones(1)
        values *= scale.view([-1 if d == dim else 1 for d in range(len(shape))])
    return values


def give_gradients(model: nn.Module, step: int) -> None:
    for name, param in model.named_parameters():
        param.grad = gradient(name, tuple(param.shape), step).to(param.dtype)


def head_labels(heads: int, dim: int, width: int) -> Tensor:
    return torch.arange(heads).repeat_interleave(dim)[:, None].expand(-1, width).contiguous()


def labels_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the paper's blocks of a parameter of Llama, Mistral or Qwen, by its name."""
    if name.endswith("bias"):
        return element_labels(*shape)
    if "norm" in name:
        return one_label(*shape)
    if ".q_proj." in name or ".k_proj." in name:
        return head_labels(HEADS if ".q_proj." in name else GROUPS, DIM, shape[1])
    return row_labels(*shape)


class Oracle:
    """All parameters of a model, updated by ``tests/reference.py``."""

    def __init__(self, model: nn.Module, labels: Mapping[str, Tensor]) -> None:
        self.parts = {
            name: WholeTensorAdamMini(param, labels[name])
            for name, param in model.named_parameters()
        }

    def step(self, step: int, **changes: Any) -> None:
        beta1, beta2 = HYPER["betas"]  # type: ignore[misc]
        hyper = {key: value for key, value in HYPER.items() if key != "betas"} | changes
        for name, part in self.parts.items():
            grad = gradient(name, tuple(part.param.shape), step)
            part.step(grad, beta1=beta1, beta2=beta2, **hyper)

    def params(self) -> Iterator[tuple[str, Tensor]]:
        for name, part in self.parts.items():
            yield name, part.param
