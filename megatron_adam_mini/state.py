"""The optimizer state of one rank: what is allocated, and how a window of it is read and written.

Imports torch, ``plan``, ``rounding`` and ``code_scales``. Everything is allocated at construction,
on all ranks, so memory does not grow at the first step, and a checkpoint can be loaded before it.

Data flow: step plan -> **RankState** -> ``main_params`` (keeps it between steps) -> kernels
(modified in place) -> checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_adam_mini.code_scales import CodeScales
from megatron_adam_mini.config import LEAN_WITHOUT_REMAINDERS
from megatron_adam_mini.plan.buffer_plan import BufferPlan, Window
from megatron_adam_mini.plan.shares import Share
from megatron_adam_mini.plan.step_plan import Piece, StepPlan
from megatron_adam_mini.rounding import from_fp8, join, split, to_fp8, to_weight

#: Where state is that was offloaded.
HOST = torch.device("cpu")


class Buffer(Protocol):
    """The live tensors of one of Megatron's buffers, fetched again in each step.

    Megatron may move a buffer between steps (offloading), so a step does not keep the tensors.
    """

    @property
    def grad(self) -> Tensor:
        """Gradients, float32, bfloat16 or float16, ``(N,)``; reduced in this rank's slices."""
        ...

    @property
    def weight(self) -> Tensor:
        """Model weights, ``(N,)``; float32 weights are their own main parameters.

        uint8: quantized weights, which others make of the main parameters after a step or load.
        """
        ...

    def values(self, where: slice) -> Tensor:
        """Return what the weights of a part of the buffer stand for."""
        ...


def check_remainders(dtypes: Iterable[torch.dtype], *, bf16: bool = False) -> None:
    """Check that the weights of a rank can have remainders.

    Args:
        dtypes: of the weights; some may be float32, which are their own main parameters. A rank
            whose stage is frozen has none.
        bf16: whether the model is bfloat16, so that other ranks have such weights.

    Raises:
        ValueError: a weight is float16, or all are float32 in a model that is not bfloat16.
    """
    found = set(dtypes)
    if torch.float16 in found or (found == {torch.float32} and not bf16):
        raise ValueError(
            "Adam-mini param_remainders=True needs bfloat16 weights, got "
            f"{', '.join(sorted(map(str, found)))}: 16 bits complete a bfloat16 to a float32, and "
            "no other type. Remedy: --bf16, or drop --adam-mini-param-remainders or "
            f"--adam-mini-lean; {LEAN_WITHOUT_REMAINDERS} saves memory with any weights."
        )


@dataclass
class BufferState:
    """State of this rank's slices of one buffer, one after the other; or of one share of it.

    A window (see ``plan.buffer_plan``) gives the position of elements in buffer and state. Without
    offload, a share is all of it. Windows of one call lie in one share.

    Attributes:
        buffer: live gradients and weights.
        share: which positions of the state, and in which memory.
        param: float32 main parameters, shape ``(L,)``. Or int16: remainders, which complete
            bfloat16 weights (see ``rounding``). ``None``: the float32 model weights themselves.
        exp_avg: m, float32 or bfloat16, shape ``(L,)``. Or uint8: codes, relative to v (see
            ``rounding``).
        exp_avg_sq_E: v of parameters that keep one per element, float32.
        scales: of the codes of m, if it consists of these.
    """

    buffer: Buffer
    share: Share
    param: Tensor | None
    exp_avg: Tensor
    exp_avg_sq_E: Tensor
    scales: CodeScales | None = None

    @classmethod
    def allocate(
        cls, buffer: Buffer, share: Share, *, exp_avg_dtype: torch.dtype, param_remainders: bool
    ) -> BufferState:
        """Allocate the state of a buffer, main parameters copied from the model weights.

        Raises:
            ValueError: remainders are selected, and weights are neither bfloat16 nor float32.
        """
        weight = buffer.weight.detach()
        device = HOST if share.on_host else weight.device

        def zeros(dtype: torch.dtype, numel: int = share.numel) -> Tensor:
            return torch.zeros(numel, dtype=dtype, device=device)

        num_elements = share.elements.stop - share.elements.start
        state = cls(buffer, share, None, zeros(exp_avg_dtype), zeros(torch.float32, num_elements))
        if weight.dtype == torch.float32:
            return state
        if param_remainders:
            check_remainders([weight.dtype])
        state.param = zeros(torch.int16 if param_remainders else torch.float32)
        if not param_remainders:  # which are zero where weights are all there is
            state.take_weights()
        return state

    @property
    def plan(self) -> BufferPlan:
        """Which slices, and tables of what the share holds."""
        return self.share.plan

    @property
    def owns_main_param(self) -> bool:
        """Whether the optimizer holds the memory of the main parameters."""
        return self.param is not None

    @property
    def param_is_weight(self) -> bool:
        """Whether the model's weights are main parameters, or their upper halves."""
        return self.param is None or self._has_remainders

    @property
    def _has_remainders(self) -> bool:
        return self.param is not None and self.param.dtype == torch.int16

    @property
    def is_quantized(self) -> bool:
        """Whether the model's weights are quantized, which is not done here."""
        return self.buffer.weight.dtype == torch.uint8

    def main_param(self, window: Window) -> Tensor:
        """Return the main parameters of a window, float32: a view, or joined from remainders."""
        if self.param is None:
            return self.buffer.weight[window.in_buffer].detach()
        param = self.param[self.share.own(window.in_state)]
        if param.dtype == torch.float32:
            return param
        return join(self.buffer.weight[window.in_buffer].to(param.device), param)

    def exp_avg_of(self, window: Window) -> Tensor:
        """Return m of a window as it is stored, a view."""
        return self.exp_avg[self.share.own(window.in_state)]

    def norm(self, window: Window) -> Tensor:
        """Return the norm of the main parameters of a window, float32, shape ``()``."""
        norms = [self.main_param(part).norm() for _, part in window.parts()]
        norm: Tensor = torch.stack(norms).norm()
        return norm

    def float32_views(self, window: Window) -> dict[str, Tensor | None]:
        """Return views of ``param`` and ``exp_avg`` of a window; ``None``: not kept as float32."""
        m = self.exp_avg_of(window)
        return {
            "param": None if self._has_remainders else self.main_param(window),
            "exp_avg": m if m.dtype == torch.float32 else None,
        }

    def as_float32(self, window: Window, kind: str) -> Tensor:
        """Return ``param`` or ``exp_avg`` of a window as float32: a view of float32 state."""
        if kind == "param":
            return self.main_param(window)
        m = self.exp_avg_of(window)
        return m.float() if self.scales is None else from_fp8(m, self.scales.of(window))

    def store(self, window: Window, values: Mapping[str, Tensor]) -> None:
        """Set main parameters, m, and the model's weights, which are rounded main parameters.

        State of lower precision is rounded to the nearest. Quantized weights stay as they are. An m
        of 8 bits is relative to v, which must be set before.

        Args:
            window: which elements.
            values: ``param`` and ``exp_avg``, shape ``(window.numel,)``, in any memory; views of
                the state, too. What is missing stays as it is.
        """
        weight, device = self.buffer.weight, self.exp_avg.device
        for where, part in window.parts():
            own = self.share.own(part.in_state)
            new = {kind: flat[where].to(device, torch.float32) for kind, flat in values.items()}
            if "exp_avg" in new:
                _copy(self._rounded(new["exp_avg"], part), self.exp_avg[own])
            if "param" not in new:
                continue
            if self.param is None:
                _copy(new["param"], weight[part.in_buffer])
            elif self._has_remainders:
                weight[part.in_buffer], self.param[own] = split(new["param"])
            else:
                _copy(new["param"], self.param[own])
                if not self.is_quantized:
                    weight[part.in_buffer] = to_weight(new["param"], weight.dtype)

    def _rounded(self, m: Tensor, window: Window) -> Tensor:
        if self.scales is not None:
            return to_fp8(m, self.scales.of(window))
        return to_weight(m, self.exp_avg.dtype)

    def write_weights(self) -> None:
        """Set the model's weights to the rounded main parameters, unless they are quantized."""
        if self.param_is_weight or self.is_quantized:
            return
        for _, _, window in self.share.windows:
            assert self.param is not None
            weight = self.buffer.weight
            param = self.param[self.share.own(window.in_state)]
            weight[window.in_buffer] = to_weight(param, weight.dtype)

    def take_weights(self, windows: Iterable[Window] | None = None) -> None:
        """Set the main parameters to the model's weights, after these were changed.

        Args:
            windows: where; default everywhere.
        """
        if self.param is None:
            return
        if windows is None:
            windows = [window for _, _, window in self.share.windows]
        for window in windows:
            param = self.param[self.share.own(window.in_state)]
            if param.dtype == torch.int16:
                param.zero_()
            else:
                param.copy_(self.buffer.values(window.in_buffer).detach())

    def bytes_by_kind(self) -> dict[str, int]:
        """Return allocated bytes of ``main_param``, ``exp_avg`` and ``exp_avg_sq``."""
        return {
            "main_param": 0 if self.param is None else self.param.nbytes,
            "exp_avg": self.exp_avg.nbytes,
            "exp_avg_sq": self.exp_avg_sq_E.nbytes,
        }


def _copy(values: Tensor, into: Tensor) -> None:
    """Copy values, unless they are there."""
    if (values.data_ptr(), values.device) != (into.data_ptr(), into.device):
        into.copy_(values)


class RankState(NamedTuple):
    """All state of one rank, as flat tensors.

    Attributes:
        on_device: main parameters, m, and v per element in device memory, one entry per buffer.
        exp_avg_sq_S: v of each segment's block, float32, in device memory.
        on_host: the same in host memory, by index of the buffer.
    """

    on_device: list[BufferState]
    exp_avg_sq_S: Tensor
    on_host: dict[int, BufferState]

    @classmethod
    def allocate(
        cls,
        plan: StepPlan,
        buffers: Sequence[Buffer],
        shares: tuple[list[Share], dict[int, Share]],
        *,
        device: torch.device,
        exp_avg_dtype: torch.dtype,
        param_remainders: bool,
    ) -> RankState:
        """Allocate all state of a rank; see :meth:`BufferState.allocate`."""

        def state_of(share: Share) -> BufferState:
            return BufferState.allocate(
                buffers[share.number],
                share,
                exp_avg_dtype=exp_avg_dtype,
                param_remainders=param_remainders,
            )

        on_device, on_host = shares
        found = cls(
            [state_of(share) for share in on_device],
            torch.zeros(plan.num_segments, dtype=torch.float32, device=device),
            {number: state_of(share) for number, share in on_host.items()},
        )
        return found.with_scales(plan)

    def with_scales(self, plan: StepPlan) -> RankState:
        """Return this state, after it was told how codes of m follow from v, if there are any."""
        for held in self.everywhere:
            if held.exp_avg.dtype == torch.uint8:
                held.scales = CodeScales(plan, held.share, self.exp_avg_sq_S, held.exp_avg_sq_E)
        return self

    @property
    def everywhere(self) -> list[BufferState]:
        """State in device and in host memory."""
        return [*self.on_device, *self.on_host.values()]

    def of(self, piece: Piece) -> BufferState:
        """Return the state that contains a piece."""
        held = self.on_host.get(piece.buffer)
        return held if held and held.share.holds(piece) else self.on_device[piece.buffer]

    def flat_tensors(self) -> list[Tensor]:
        """Return what the optimizer has allocated: share after share, then v of blocks."""
        found: list[Tensor] = []
        for held in self.everywhere:
            found += [held.exp_avg] if held.param is None else [held.param, held.exp_avg]
            found.append(held.exp_avg_sq_E)
        return [*found, self.exp_avg_sq_S]

    def v_of_segments(self, piece: Piece) -> Tensor:
        """Return v of a piece's segments, a view of shape ``(segments of the piece,)``."""
        return self.exp_avg_sq_S[piece.segments]

    def v_of_elements(self, piece: Piece) -> Tensor:
        """Return v of a piece that keeps one per element, a view; empty for other pieces."""
        held = self.of(piece)
        return held.exp_avg_sq_E[held.share.own_elements(piece.elements)]

    def bytes_by_kind(self) -> dict[str, int]:
        """Return allocated bytes of ``main_param``, ``exp_avg`` and ``exp_avg_sq``.

        They are those in device memory; names of what is in host memory begin with ``host_``.
        """
        found = {
            "main_param": 0,
            "exp_avg": 0,
            "exp_avg_sq": self.exp_avg_sq_S.nbytes,
        }
        for held in self.everywhere:
            for kind, num_bytes in held.bytes_by_kind().items():
                name = f"host_{kind}" if held.share.on_host else kind
                found[name] = found.get(name, 0) + num_bytes
        return found
