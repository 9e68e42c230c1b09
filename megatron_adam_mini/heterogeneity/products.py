"""Hessian of one block, times a vector, by differentiating twice.

Imports torch and ``parts``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_adam_mini.heterogeneity.parts import Part

#: ``loss(module, batch)`` -> scalar.
Loss = Callable[[nn.Module, Any], Tensor]


class BlockHessian:
    """The Hessian of the mean loss by the elements of one block, as products.

    Of one batch, the graph of the gradient is kept between products; of several, it is made anew
    for each, so that memory does not grow with their number.

    Args:
        part: the block.
        module: holds its parameter.
        loss: ``loss(module, batch)``; the same number each time.
        batches: over which the loss is averaged.
    """

    def __init__(self, part: Part, module: nn.Module, loss: Loss, batches: Sequence[Any]) -> None:
        self.part, self.module, self.loss, self.batches = part, module, loss, batches
        self._kept = self._gradient(batches[0]) if len(batches) == 1 else None

    def __call__(self, vector: Tensor) -> Tensor:
        """Return H times a vector; both have the shape ``(part.numel,)``."""
        param = self.part.param
        whole = self.part.spread(vector)
        result = torch.zeros_like(vector)
        for batch in self.batches:
            gradient = self._gradient(batch) if self._kept is None else self._kept
            if not gradient.requires_grad:  # the loss is linear in the parameter
                continue
            (product,) = torch.autograd.grad(
                gradient, param, whole, retain_graph=True, materialize_grads=True
            )
            result += self.part.gather(product)
        return result / len(self.batches)

    def _gradient(self, batch: Any) -> Tensor:
        # Fused attention has no second derivatives.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = self.loss(self.module, batch)
            (gradient,) = torch.autograd.grad(
                loss, self.part.param, create_graph=True, materialize_grads=True
            )
        return gradient
