"""Arguments of kernels besides a segment table and the step's scalars: tensors and vectors.

Imports torch. The C++ structs ``Buffer`` and ``Segments`` hold the same.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BufferTensors(NamedTuple):
    """Tensors of one buffer, and of the state of this rank's slices of it.

    A segment table has a position in the buffer, where ``weight`` and ``grad`` (shape ``(N,)``) are
    read, and one in the state, where ``exp_avg`` and ``param`` (shape ``(L,)``) are. Exception:
    float32 weights are their own main parameters, so ``param`` is then the buffer, with shape
    ``(N,)``, and ``weight`` is ``None``.

    Attributes:
        param: float32 main parameters; or int16 remainders, which together with a bfloat16
            ``weight`` make up the main parameters (see ``rounding``).
        exp_avg: m, float32 or bfloat16. Or uint8: codes of 8 bits (see ``rounding``).
        weight: model weights, bfloat16 or float16; ``None``: ``param`` is the weight. Or uint8:
            quantized weights, which are neither read nor written.
        grad: float32, bfloat16 or float16; only read.
    """

    param: Tensor
    exp_avg: Tensor
    weight: Tensor | None
    grad: Tensor

    @classmethod
    def of(
        cls, param: Tensor | None, exp_avg: Tensor, weight: Tensor, grad: Tensor
    ) -> BufferTensors:
        """Return them in their places; ``param`` is ``None`` where weights are main parameters."""
        if param is None:
            return cls(weight, exp_avg, None, grad)
        return cls(param, exp_avg, weight, grad)


class SegmentVectors(NamedTuple):
    """Vectors with one entry per segment of the rank; in ``_SR``, one per element range follows.

    Attributes:
        exp_avg_sq_S: v of the segment's block, float32.
        step_size_S: float32.
        sum_sq_SR: sums of squares of the gradient, float32.
        inv_numel_S: 1 / elements of the segment's whole block, float32.
        group_SR: parameter group, int32.
        origin_SR: ``None``: a bfloat16 m is rounded to the nearest. Otherwise stochastically:
            int32, whose bits are the number of each segment's first element. The noise of an
            element depends on its number, counted from there, and on the step. An m of 8 bits needs
            it.
        exp_avg_scale_S2: scale of the codes of an m of 8 bits before the step and after it,
            float32: ``segment_step_size_`` derives both from v, and updates read them. ``None`` for
            other m. Where elements have v, their scales come from there.
    """

    exp_avg_sq_S: Tensor
    step_size_S: Tensor
    sum_sq_SR: Tensor
    inv_numel_S: Tensor
    group_SR: Tensor
    origin_SR: Tensor | None = None
    exp_avg_scale_S2: Tensor | None = None
