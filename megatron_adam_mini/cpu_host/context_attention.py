"""Attention under context parallelism, which Megatron's own local attention refuses.

A rank of a context-parallel group holds two chunks of every sequence: of ``2 * size`` chunks,
number ``rank`` and number ``2 * size - 1 - rank``, so that causal attention costs every rank the
same. Its queries need the keys and values of the whole sequence: these are gathered and put in
order, the mask has the rows of the rank's positions, and the rest is Megatron's own attention.

Imports torch, never Megatron.
"""

import copy
import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

__all__ = ["attend_over_context"]


def attend_over_context(module: ModuleType) -> None:
    """Let ``DotProductAttention`` of a module run under context parallelism (modified in place).

    Without context parallelism the class does what it did before.

    Args:
        module: ``megatron.core.transformer.dot_product_attention``.
    """
    attention = module.DotProductAttention
    init, forward = attention.__init__, attention.forward

    @functools.wraps(init)
    def init_for_context(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.context_parallel_size == 1:
            init(self, config, *args, **kwargs)
            return
        without_context = copy.copy(config)
        without_context.context_parallel_size = 1
        init(self, without_context, *args, **kwargs)
        self.config = config
        whole_job = module.parallel_state.get_context_parallel_group
        self.context_group = getattr(kwargs.get("pg_collection"), "cp", None) or whole_job()
        # Megatron's softmax would place the window by numbers of queries and keys alone.
        self.context_window = self.scale_mask_softmax.window_size
        self.scale_mask_softmax.window_size = None

    @functools.wraps(forward)
    def forward_over_context(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self.config.context_parallel_size > 1:
            key = whole_sequence(key, self.context_group)
            value = whole_sequence(value, self.context_group)
            attention_mask = _mask(self, attention_mask, len(key))
        context: Tensor = forward(self, query, key, value, attention_mask, *args, **kwargs)
        return context

    attention.__init__ = init_for_context
    attention.forward = forward_over_context


def positions(rank: int, size: int, length: int) -> Tensor:
    """Return the positions in the sequence that a rank holds, int64, shape ``(length / size,)``.

    Args:
        rank: in the context-parallel group.
        size: of that group.
        length: of the whole sequence, a multiple of ``2 * size``.
    """
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def whole_sequence(part: Tensor, group: ProcessGroup) -> Tensor:
    """Return the whole sequence, in order; all ranks of the group must call it.

    Args:
        part: what this rank holds of it, shape ``(length / size, ...)``.
        group: the context-parallel group.

    Returns:
        Shape ``(length, ...)``; its gradients are summed over the group.
    """
    size = group.size()
    length = len(part) * size
    held = torch.cat([positions(rank, size, length) for rank in range(size)])
    gathered: Tensor = _Gather.apply(part, group)
    return gathered[held.argsort()]


class _Gather(torch.autograd.Function):
    """All-gather along dimension 0; backward, each rank gets the sum of its part's gradients."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [part.new_empty(part.shape) for _ in range(group.size())]
        distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        distributed.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


def _mask(attention: Any, given: Tensor | None, length: int) -> Tensor | None:
    """Return which keys this rank's queries must not see, as Megatron's softmax would.

    Args:
        attention: the module.
        given: rows of this rank's queries, columns of the whole sequence, or ``None``.
        length: of the whole sequence.

    Returns:
        True where a score is masked, shape ``(length / size, length)``; or ``given``.
    """
    group = attention.context_group
    query = positions(group.rank(), group.size(), length)[:, None]
    ahead = torch.arange(length)[None, :] - query  # how far a key lies after the query
    window: tuple[int, int] | None = attention.context_window
    if window is not None:
        return (ahead < -window[0]) | (ahead > window[1])
    if given is None and attention.attn_mask_type.name == "causal":
        return ahead > 0
    return given
