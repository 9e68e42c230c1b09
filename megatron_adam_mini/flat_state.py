"""Flat tensors of the state that exist only as views: found in place, or put together anew.

Imports torch, ``plan`` and ``state``. Data flow: views that callers have moved, replaced or cleared
-> **FlatState** -> ``RankState`` of a step, save or load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from megatron_adam_mini.plan.shares import Share
from megatron_adam_mini.plan.step_plan import Piece, StepPlan
from megatron_adam_mini.state import HOST, Buffer, BufferState, RankState

#: Keys of a shard's state. Megatron's precision-aware optimizer has ``master_param``, too.
EXP_AVG, EXP_AVG_SQ, REMAINDERS = "exp_avg", "exp_avg_sq", "master_param"
#: The shard itself, where it is not a view of the model's weights.
SHARD = "param"
#: Type of an m of 8 bits, see ``rounding``.
CODES = torch.uint8


class Views(NamedTuple):
    """What callers see, and may replace, in the order of ``plan.pieces``.

    Attributes:
        shards: main shards.
        states: the state of each.
    """

    shards: Sequence[Tensor]
    states: Sequence[dict[str, Tensor]]

    def get(self, number: int, key: str) -> Tensor | None:
        """Return a view of shard ``number``; ``None``: its state was cleared."""
        return self.shards[number] if key == SHARD else self.states[number].get(key)

    def put(self, number: int, key: str, view: Tensor) -> None:
        """Put a view in the place of another."""
        if key == SHARD:
            self.shards[number].data = view
        else:  # .data: a view would keep its base even after a caller's ``.data = ...``
            self.states[number][key] = view.data


def are_codes(values: Tensor) -> bool:
    """Return whether values are codes of an m of 8 bits, as such or as the floats 0, 1, ..., 255.

    An m that is all zero passes, too: its codes are zero.
    """
    return values.dtype == CODES or torch.equal(values.to(CODES).to(values.dtype), values)


@dataclass(frozen=True, eq=False)
class FlatTensor:
    """One flat tensor, which exists as the views that make it up.

    Attributes:
        key: key of the views in the state of their shards, or ``SHARD``.
        numel, dtype, device: of the flat tensor.
        on_host: whether it is in host memory for good.
        members: numbers of the shards.
        slots: position of each view.
    """

    key: str
    numel: int
    dtype: torch.dtype
    device: torch.device
    on_host: bool
    members: tuple[int, ...]
    slots: tuple[slice, ...]

    def takes(self, view: Tensor) -> bool:
        """Return whether a tensor can be copied to the place of a view without harm.

        Numbers may be rounded, but bits of codes and remainders are no numbers. Exception: callers
        that keep m and v in one tensor bring back codes as the floats 0, 1, ..., 255.
        """
        if view.dtype == self.dtype:
            return True
        if not view.is_floating_point():
            return False
        return self.dtype.is_floating_point or (self.dtype == CODES and are_codes(view))

    def of(self, views: Views) -> list[Tensor | None]:
        """Return the views that make it up."""
        return [views.get(number, self.key) for number in self.members]

    def in_place(self, views: Views, device: torch.device) -> Tensor | None:
        """Return the flat tensor if all its views are in place on a device."""
        own = self.of(views)
        if not own:
            return torch.zeros(self.numel, dtype=self.dtype, device=device)
        first, size = own[0], self.dtype.itemsize
        if first is None or first.device != device or first.dtype != self.dtype:
            return None
        storage = first.untyped_storage()
        base = storage.data_ptr()
        # Addresses within one living storage belong to it.
        if storage.nbytes() >= self.numel * size and all(
            view is not None and view.data_ptr() == base + slot.start * size
            for view, slot in zip(own, self.slots, strict=True)
        ):
            return first.as_strided((self.numel,), (1,), 0)
        return None

    def point_at(self, whole: Tensor, views: Views) -> None:
        """Let all views be those of a tensor."""
        for number, slot in zip(self.members, self.slots, strict=True):
            views.put(number, self.key, whole[slot])


class FlatState:
    """The flat tensors of a rank; nobody keeps them but the views.

    Args:
        plan: all integers.
        state: allocated state, described but not kept.
        device: where the flat tensors are, unless in host memory for good.
    """

    def __init__(self, plan: StepPlan, state: RankState, device: torch.device) -> None:
        self._plan = plan
        self._shares = [held.share for held in state.everywhere]
        self._flats = _flats_of(plan, state, device)

    def attach(
        self, views: Views, buffers: Sequence[Buffer], *, where_it_is: bool = False
    ) -> RankState:
        """Return the state, after taking over what callers have replaced; see ``MainParams``.

        Raises:
            ValueError: a replaced tensor has another shape, or a type that has no place there.
        """
        stays = where_it_is and all(
            view is not None and view.device == HOST
            for flat in self._flats
            for view in flat.of(views)
        )
        found = []
        for flat in self._flats:
            device = HOST if stays else flat.device
            whole = flat.in_place(views, device)
            found.append(self._gather(flat, views, device) if whole is None else whole)
        return self._rank_state(buffers, found)

    @property
    def has_codes(self) -> bool:
        """Whether m has 8 bits."""
        return any(flat.dtype == CODES for flat in self._flats)

    @property
    def with_remainders(self) -> frozenset[int]:
        """Numbers of the shards that are stored as a weight and 16 bits."""
        flats = (flat for flat in self._flats if flat.key == REMAINDERS)
        return frozenset(number for flat in flats for number in flat.members)

    def point_at(self, state: RankState, views: Views) -> None:
        """Let all views be those of a state that :meth:`attach` returned, or that is new."""
        for flat, whole in zip(self._flats, state.flat_tensors(), strict=True):
            flat.point_at(whole, views)

    def move_to(self, device: torch.device, views: Views) -> None:
        """Move everything to new memory, but what is in host memory for good."""
        for flat in self._flats:
            if not flat.on_host:
                self._gather(flat, views, device)

    @torch.no_grad()
    def _gather(self, flat: FlatTensor, views: Views, device: torch.device) -> Tensor:
        """Copy the views of a flat tensor into a new one, and let them be views of it."""
        whole = torch.zeros(flat.numel, dtype=flat.dtype, device=device)
        for number, view, slot in zip(flat.members, flat.of(views), flat.slots, strict=True):
            if view is None:  # a cleared state starts from zero, as torch's own
                continue
            if view.shape != (slot.stop - slot.start,):
                self.refuse_shape(number, flat.key, view, slot.stop - slot.start)
            if not flat.takes(view.detach()):
                self._refuse_dtype(number, flat.key, view, flat.dtype)
            whole[slot].copy_(view.detach())
        flat.point_at(whole, views)
        return whole

    def _rank_state(self, buffers: Sequence[Buffer], flat_tensors: Sequence[Tensor]) -> RankState:
        *of_shares, exp_avg_sq_S = flat_tensors
        remaining = iter(zip(self._flats, of_shares, strict=False))
        on_device, on_host = [], {}
        for share in self._shares:
            param = None
            flat, whole = next(remaining)
            if flat.key != EXP_AVG:
                param = whole
                _, whole = next(remaining)
            _, exp_avg_sq_E = next(remaining)
            held = BufferState(buffers[share.number], share, param, whole, exp_avg_sq_E)
            if share.on_host:
                on_host[share.number] = held
            else:
                on_device.append(held)
        return RankState(on_device, exp_avg_sq_S, on_host).with_scales(self._plan)

    def _refuse_dtype(self, number: int, key: str, found: Tensor, dtype: torch.dtype) -> NoReturn:
        raise ValueError(
            f"{key!r} of {self._name(number)!r} was replaced by a tensor of {found.dtype}; "
            f"Adam-mini's has {dtype} here. Assign a tensor of this dtype; load_state_dict turns "
            "an m of floats into one of 8 bits, and back."
        )

    def refuse_shape(self, number: int, key: str, found: Tensor, numel: int) -> NoReturn:
        """Refuse a tensor that a caller has put in a place of ``numel`` elements."""
        raise ValueError(
            f"{key!r} of {self._name(number)!r} was replaced by a tensor of shape "
            f"{tuple(found.shape)}; Adam-mini's has shape ({numel},) on this rank. Assign a tensor "
            "of this shape."
        )

    def _name(self, number: int) -> str:
        return self._plan.parameters[self._plan.pieces[number].parameter].info.name


def _flats_of(plan: StepPlan, state: RankState, device: torch.device) -> list[FlatTensor]:
    """Describe the flat tensors, in the order of ``RankState.flat_tensors``."""
    slots_of: list[tuple[str, Share | None, Callable[[Share | None, Piece], slice]]] = []
    for held in state.everywhere:
        if held.param is not None:
            key = REMAINDERS if held.param_is_weight else SHARD
            slots_of.append((key, held.share, _in_state))
        slots_of += [(EXP_AVG, held.share, _in_state), (EXP_AVG_SQ, held.share, _elements)]
    slots_of.append((EXP_AVG_SQ, None, _segments))
    pieces_of: dict[Share | None, list[int]] = {None: list(range(len(plan.pieces)))}
    for number, piece in enumerate(plan.pieces):
        pieces_of.setdefault(state.of(piece).share, []).append(number)
    flats = []
    for (key, share, slot_of), whole in zip(slots_of, state.flat_tensors(), strict=True):
        views = {number: slot_of(share, plan.pieces[number]) for number in pieces_of.get(share, ())}
        views = {number: slot for number, slot in views.items() if slot.stop > slot.start}
        on_host = share is not None and share.on_host
        where = HOST if on_host else device
        members, slots = tuple(views), tuple(views.values())
        flats.append(FlatTensor(key, whole.numel(), whole.dtype, where, on_host, members, slots))
    return flats


def _in_state(share: Share | None, piece: Piece) -> slice:
    assert share is not None
    return share.own(piece.window.in_state)


def _elements(share: Share | None, piece: Piece) -> slice:
    assert share is not None
    return share.own_elements(piece.elements)


def _segments(_: Share | None, piece: Piece) -> slice:
    return piece.segments
