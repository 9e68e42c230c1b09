"""Module -> the blocks whose Hessians are looked at, by Adam-mini's partition.

Imports torch, numpy, ``config`` and ``standalone``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.plan.partition import IntArray, unmatched_patterns
from megatron_adam_mini.standalone.blocks import Blocks, Heads, partition
from megatron_adam_mini.standalone.names import bare, weights_of


@dataclass(frozen=True, eq=False)
class Part:
    """One block.

    Attributes:
        name: of its parameter, with the number of the block if that has several.
        param: the whole parameter.
        index: int64, places of the block's elements in the flat parameter; ``None``: all of it.
    """

    name: str
    param: Tensor
    index: Tensor | None

    @property
    def numel(self) -> int:
        """Elements of the block."""
        return self.param.numel() if self.index is None else len(self.index)

    def gather(self, whole: Tensor) -> Tensor:
        """Return the block's elements of a tensor like the parameter, flat."""
        flat = whole.reshape(-1)
        return flat if self.index is None else flat[self.index]

    def spread(self, vector: Tensor) -> Tensor:
        """Return a tensor like the parameter: a vector in the block, zeros elsewhere."""
        if self.index is None:
            return vector.reshape(self.param.shape)
        flat = vector.new_zeros(self.param.numel())
        flat[self.index] = vector
        return flat.reshape(self.param.shape)


def parts_of(
    module: nn.Module,
    config: AdamMiniConfig,
    heads: Heads,
    *,
    patterns: Sequence[str] = ("*",),
    vectors: bool = False,
    blocks_per_parameter: int = 4,
    seed: int = 0,
) -> list[Part]:
    """Return the blocks to look at, in the order of the module's parameters.

    A parameter with one second moment per element is one block here: the Hessian of a single
    element has no spectrum to compare.

    Args:
        module: any.
        config: its preset and rules make the blocks.
        heads: the module's, for rules that need them.
        patterns: ``fnmatch`` patterns of names; a parameter that matches none is left out.
        vectors: also biases, norms and whatever else has fewer than two dimensions.
        blocks_per_parameter: of a parameter with more, so many are drawn at random.
        seed: for that.

    Raises:
        ValueError: nothing is left, a pattern or rule matches nothing, or heads are missing.
    """
    params = {bare(name): param for name, param in module.named_parameters() if param.requires_grad}
    if unmatched := unmatched_patterns(list(params), config):
        raise ValueError(
            f"Adam-mini rules for {', '.join(map(repr, unmatched))} match no parameter; there are "
            f"{', '.join(list(params)[:8])}, ... Remedy: patterns that match."
        )
    weights = weights_of({name: tuple(param.shape) for name, param in params.items()})
    draw = np.random.default_rng(seed)
    found = []
    for name, param in params.items():
        if (param.ndim > 1 or vectors) and any(fnmatchcase(name, text) for text in patterns):
            weight, own = weights[name], heads
            if config.preset == "tensor" and len(weight.parts) == 1 and heads.num_heads is None:
                own = Heads(1)  # the blocks are the same for any number
            blocks = partition(name, tuple(param.shape), weight, own, config)
            found += _parts(blocks, param, draw, blocks_per_parameter)
    if len(found) < 2:
        raise ValueError(
            f"{len(found)} block is left of {len(params)} trained parameters, and two are the "
            f"fewest to compare; there are {', '.join(list(params)[:8])}, ... Remedy: other "
            "--parameters, or --vectors."
        )
    return found


def _parts(blocks: Blocks, param: Tensor, draw: np.random.Generator, most: int) -> list[Part]:
    labels = blocks.block_of_row
    if labels is None or blocks.num_blocks == 1:
        return [Part(blocks.name, param, None)]
    chosen = np.arange(blocks.num_blocks)
    if most < len(chosen):
        chosen = np.sort(draw.choice(chosen, most, replace=False))
    return [
        Part(f"{blocks.name}[{block}]", param, _index(labels == block, blocks).to(param.device))
        for block in chosen
    ]


def _index(rows: IntArray, blocks: Blocks) -> Tensor:
    """Return the places of chosen rows' elements in the flat parameter."""
    by_dims = rows.reshape(blocks.row_shape).transpose(np.argsort(blocks.row_dims))
    shape = [size if dim in blocks.row_dims else 1 for dim, size in enumerate(blocks.shape)]
    of_block = np.broadcast_to(by_dims.reshape(shape), blocks.shape)
    return torch.from_numpy(np.flatnonzero(of_block))
