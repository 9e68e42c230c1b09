"""When buckets of gradients are reduced, and what changes gradients after that.

Imports ``compat``, ``overlapped_sums``, and calls methods of megatron.core's DDP in the place of
their callers. Data flow: DDP's bucket groups -> **OverlappedSums** -> optimizer.

The order of an iteration, in all releases that ``compat`` names: the backward pass starts the
reduction of each group of buckets (``start_grad_sync``); ``finalize_model_grads`` waits for those
of all chunks (``finish_grad_sync``), and only then changes gradients:

* over tensor parallelism it adds up those of weights that are not split: norms and biases under
  sequence parallelism, the norms of Query and Key, weights that are marked for an average;
* over pipeline stages those of tied embeddings, of the embedding that heads of multi-token
  prediction use, and of positions; in diffusion models those of conditional embedders;
* with a loss per token, which is refused here, it divides all of them by the number of tokens.

The bias of a router that balances experts is no gradient. The first two kinds are left to the step;
conditional embedders are changed by operations that torch counts. Embeddings are always left to
it: they are reduced last, when no backward pass is left, and callers that treat some tokens in
their own way change rows of them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from megatron_adam_mini.mcore import compat
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.overlapped_sums import Bucket, OverlappedSums

_EMBEDDINGS = ("embedding", "position_embedding", "tokentype_embedding")


def overlap_sums(
    inner: AdamMini,
    model_chunks: Sequence[Any],
    model_params: Sequence[Parameter],
    *,
    tp_size: int,
    pp_size: int,
) -> None:
    """Let an optimizer take its sums of squares behind the backward passes of model chunks.

    Args:
        inner: the optimizer.
        model_chunks: DDP-wrapped chunks.
        model_params: all trainable parameters, in the plan's numbering.
        tp_size: tensor-parallel ranks.
        pp_size: pipeline stages.
    """
    late = [
        (tp_size > 1 and _is_changed_over_tp(param))
        or (pp_size > 1 and blocks.info.role == "output")
        or blocks.info.role in _EMBEDDINGS
        for param, blocks in zip(model_params, inner.plan.parameters, strict=True)
    ]
    sums = OverlappedSums(inner.plan, inner.buffers, inner.kernels, late, device=inner.device)
    inner.overlapped_sums = sums
    found = {
        id(bucket): Bucket(number, index)
        for number, buffer in enumerate(inner.buffers)
        for index, bucket in enumerate(buffer.buckets)  # type: ignore[attr-defined]
    }
    for chunk in model_chunks:
        buffers: set[int] = set()
        for group in compat.bucket_groups(chunk):
            buckets = [found[id(bucket)] for bucket in group.buckets]
            buffers |= {bucket.buffer for bucket in buckets}
            _take_when_started(group, buckets, sums)
        _complete_when_finished(chunk, buffers, sums)


def _is_changed_over_tp(param: Parameter) -> bool:
    """Return whether tensor-parallel ranks may add up a parameter's reduced gradients."""
    split = getattr(param, "tensor_model_parallel", False)
    marks = ("sequence_parallel", "average_gradients_across_tp_domain")
    return not split or any(getattr(param, mark, False) for mark in marks)


def _take_when_started(group: Any, buckets: Sequence[Bucket], sums: OverlappedSums) -> None:
    """Let ``start_grad_sync`` of a group of buckets start their sums, too."""
    taker, start = weakref.ref(sums), _original(group, "start_grad_sync")

    @functools.wraps(start)
    def start_grad_sync(*args: Any, **kwargs: Any) -> None:
        wait = compat.start_reduction(group, lambda: start(*args, **kwargs))
        sums = taker()
        # A graph that is replayed does not come by here, so its sums are the step's to take.
        if wait and sums is not None and not torch.cuda.is_current_stream_capturing():
            sums.take(buckets, wait)

    _replace(group, start_grad_sync, start)


def _complete_when_finished(chunk: Any, buffers: set[int], sums: OverlappedSums) -> None:
    """Let ``finish_grad_sync`` of a chunk note that its buffers are reduced."""
    taker, finish = weakref.ref(sums), _original(chunk, "finish_grad_sync")

    @functools.wraps(finish)
    def finish_grad_sync(*args: Any, **kwargs: Any) -> None:
        finish(*args, **kwargs)
        sums = taker()
        if sums is not None:
            sums.complete(buffers)

    _replace(chunk, finish_grad_sync, finish)


def _original(owner: Any, name: str) -> Callable[..., Any]:
    """Return a method without what another optimizer of ours has put in its place."""
    found: Callable[..., Any] = getattr(owner, name)
    original: Callable[..., Any] = getattr(found, "original_of_adam_mini", found)
    return original


def _replace(owner: Any, method: Any, original: Callable[..., Any]) -> None:
    """Put a function in the place of a method, for this object alone."""
    method.original_of_adam_mini = original
    setattr(owner, method.__name__, method)
