"""Adam-mini on whole tensors: an oracle that fits on one page and shares no code with the package.

Blocks are given by the caller as a tensor of integer labels with the parameter's shape; elements
with the same label share one second moment. Everything is computed in float64.

Source: Zhang et al., arXiv:2406.16793, Algorithm 2, with AdamW's decoupled weight decay.
"""

from __future__ import annotations

import torch
from torch import Tensor


class WholeTensorAdamMini:
    """Adam-mini for one parameter.

    Args:
        param: initial value, any shape.
        labels: int64 block label of each element, same shape as ``param``.
    """

    def __init__(self, param: Tensor, labels: Tensor) -> None:
        self.param = param.detach().double().clone()
        self.labels = labels.reshape(-1)
        self.exp_avg = torch.zeros_like(self.param)
        self.v = torch.zeros(int(labels.max()) + 1, dtype=torch.float64)
        self.count = torch.bincount(self.labels, minlength=len(self.v)).double()
        self.t = 0

    def step(
        self,
        grad: Tensor,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        """Take one step with a whole gradient."""
        grad = grad.detach().double()
        self.t += 1
        square = (grad * grad).reshape(-1)
        total = torch.zeros_like(self.v).index_add_(0, self.labels, square)
        self.v = beta2 * self.v + (1 - beta2) * total / self.count
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * grad
        v_hat = self.v_of_elements() / (1 - beta2**self.t)
        m_hat = self.exp_avg / (1 - beta1**self.t)
        self.param = self.param - lr * weight_decay * self.param
        self.param = self.param - lr * m_hat / (v_hat.sqrt() + eps)

    def v_of_elements(self) -> Tensor:
        """Return v of every element's block, shaped like the parameter."""
        return self.v[self.labels].reshape(self.param.shape)


def qkv_labels(
    num_heads: int, num_query_groups: int, head_dim: int, width: int, gated: bool = False
) -> Tensor:
    """Return labels of a fused QKV weight: a block per Q and K head, per gate and V row.

    Rows are interleaved by query group: its Q heads, its gate heads, its K head, its V head.
    """
    rows: list[int] = []
    per_group = num_heads // num_query_groups
    label = 0
    for _ in range(num_query_groups):
        for _ in range(per_group):
            rows += [label] * head_dim
            label += 1
        if gated:
            rows += range(label, label + per_group * head_dim)
            label += per_group * head_dim
        rows += [label] * head_dim
        label += 1
        rows += range(label, label + head_dim)
        label += head_dim
    return torch.tensor(rows)[:, None].expand(-1, width).contiguous()


def row_labels(rows: int, width: int) -> Tensor:
    """Return labels with one block per row."""
    return torch.arange(rows)[:, None].expand(rows, width).contiguous()


def one_label(*shape: int) -> Tensor:
    """Return labels with one block for the whole tensor."""
    return torch.zeros(shape, dtype=torch.int64)


def element_labels(*shape: int) -> Tensor:
    """Return labels with one block per element: plain AdamW."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape)
