"""A few gradients of each piece, kept to see whether they have changed later.

Imports torch, ``plan`` and ``state``. Data flow: reduced gradients -> **GradientSamples** ->
``overlapped_sums``, which asks before it lets a step use older sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.plan.buffer_plan import Window
from megatron_adam_mini.state import Buffer

#: Gradients of a piece that are kept, at equal distances, the first and the last among them.
SAMPLES = 16

_BITS = {2: torch.int16, 4: torch.int32}


class GradientSamples:
    """Gradients of one buffer, kept bucket by bucket, and compared bit by bit.

    Args:
        buffer: live tensors.
        windows: of the pieces of each bucket.
        device: where the buffer is.
    """

    def __init__(
        self, buffer: Buffer, windows: Sequence[Sequence[Window]], device: torch.device
    ) -> None:
        self._buffer = buffer
        found = [_positions(of_bucket) for of_bucket in windows]
        self._ends = [0, *accumulate(map(len, found))]
        positions = np.concatenate([np.empty(0, dtype=np.int64), *found])
        self._positions = torch.from_numpy(positions).to(device)
        self._kept = torch.zeros(len(positions), dtype=buffer.grad.dtype, device=device)

    def keep(self, bucket: int) -> None:
        """Keep the gradients of a bucket as they are now."""
        here = slice(self._ends[bucket], self._ends[bucket + 1])
        torch.index_select(self._buffer.grad, 0, self._positions[here], out=self._kept[here])

    def differ(self) -> Tensor:
        """Return whether one differs from what was kept, one bool on the device."""
        now = torch.index_select(self._buffer.grad, 0, self._positions)
        bits = _BITS[now.element_size()]
        return (now.view(bits) != self._kept.view(bits)).any()


def _positions(windows: Sequence[Window]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    parts = [np.empty(0, dtype=np.int64)]
    for window in windows:
        begin, end = window.in_buffer.start, window.in_buffer.stop
        parts.append(np.unique(np.linspace(begin, end - 1, SAMPLES).astype(np.int64)))
    return np.concatenate(parts)
