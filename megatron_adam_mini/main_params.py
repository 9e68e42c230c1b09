"""The state of one rank as callers know it from torch: shards with their moments, free to move.

Imports torch, ``plan``, ``piece_values``, ``rounding``, ``state`` and ``flat_state``. Data flow:
flat tensors of ``state`` <-> **MainParams**: one main shard per parameter, and its moments.

The flat tensors that kernels need exist only as these views: nobody else keeps them between two
steps. So callers may treat the state as that of any torch optimizer: move it to the CPU and back
between two phases of a training, replace it, clear it. What stands here when a step, a save or a
load begins is the state.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from megatron_adam_mini.flat_state import (
    CODES,
    EXP_AVG,
    EXP_AVG_SQ,
    REMAINDERS,
    SHARD,
    FlatState,
    Views,
    are_codes,
)
from megatron_adam_mini.piece_values import v_per_element
from megatron_adam_mini.plan.step_plan import Piece, StepPlan
from megatron_adam_mini.rounding import fp8_scale, from_fp8, to_fp8
from megatron_adam_mini.state import RankState


class MainParams(torch.optim.Optimizer):
    """Main shards of one rank in parameter groups, with their moments; steps are not taken here.

    A shard is the part of one parameter that this rank updates, one-dimensional: a view of the
    float32 main parameters; of the model's weights if these are float32, or if remainders
    complete them. The state of a shard with ``n`` elements:

    * ``exp_avg``: m, float32 or bfloat16, shape ``(n,)``. Or uint8: codes, relative to
      ``exp_avg_sq`` (see ``rounding``), so that who writes one of the two must write both;
    * ``exp_avg_sq``: v, float32. One value for each block that the shard has elements of, in the
      order of its elements; shape ``(n,)`` for parameters that keep one value per element. See
      :meth:`exp_avg_sq_per_element`;
    * ``master_param``: remainders, int16, shape ``(n,)``, if these are used.

    ``step`` of each group is the number of steps taken. All of it may be written.

    Args:
        plan: all integers.
        state: allocated state; its flat tensors are kept as views only.
        param_groups: torch-style groups; their ``params`` are replaced by shards.
        group_of_parameter: index of the group of each parameter of the plan.
        device: where the flat tensors are.

    Attributes:
        shards: in the order of ``plan.pieces``.
        group_of_parameter: as above.
    """

    def __init__(
        self,
        plan: StepPlan,
        state: RankState,
        param_groups: Sequence[dict[str, Any]],
        group_of_parameter: Sequence[int],
        *,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self.group_of_parameter = tuple(group_of_parameter)
        self._buffers = [held.buffer for held in state.on_device]
        self._flat_state = FlatState(plan, state, device)
        self.shards = [
            # ``data``: torch's views keep their base alive, even after they were moved.
            (self._weight(piece) if held.param_is_weight else held.main_param(piece.window)).data
            for piece in plan.pieces
            for held in (state.of(piece),)
        ]
        self._is_weight = [state.of(piece).param_is_weight for piece in plan.pieces]
        groups: list[dict[str, Any]] = [{**group, "params": []} for group in param_groups]
        for shard, piece in zip(self.shards, plan.pieces, strict=True):
            groups[group_of_parameter[piece.parameter]]["params"].append(shard)
        self._sealed = False
        # torch wants one group, even if nothing in the whole model is trainable.
        super().__init__(groups or [{"params": []}], {"step": 0})
        if not groups:
            self.param_groups.clear()
        self._sealed = True
        self._params = [list(group["params"]) for group in self.param_groups]
        for shard in self.shards:
            self.state[shard] = {}
        self._flat_state.point_at(state, self._views())

    # What a step, a save or a load uses.

    @property
    def step_count(self) -> int:
        """Steps taken, as the groups say.

        Raises:
            ValueError: they disagree.
        """
        steps = {int(group["step"]) for group in self.param_groups} or {0}
        if len(steps) != 1:
            raise ValueError(
                f"Parameter groups have taken {sorted(steps)} steps; all groups of Adam-mini take "
                'the same steps. Set group["step"] of all to one number.'
            )
        return steps.pop()

    @step_count.setter
    def step_count(self, steps: int) -> None:
        for group in self.param_groups:
            group["step"] = steps

    def group_of(self, piece: Piece) -> dict[str, Any]:
        """Return the parameter group of a piece."""
        group: dict[str, Any] = self.param_groups[self.group_of_parameter[piece.parameter]]
        return group

    def attach(self, *, where_it_is: bool = False) -> RankState:
        """Return the state as flat tensors, after taking over what callers have replaced.

        Nothing is copied unless a tensor was replaced. Keep the result no longer than a step, save
        or load takes: it holds the memory that callers may want to free.

        Args:
            where_it_is: leave all of it on the CPU if it was moved there, for a save.

        Raises:
            ValueError: a replaced tensor has another shape, or a type that has no place there, or
                a group has other shards.
        """
        self._check_groups()
        views = self._views()
        for number, is_weight in enumerate(self._is_weight):
            if is_weight:
                self._write_weight(number)
        return self._flat_state.attach(views, self._buffers, where_it_is=where_it_is)

    @contextmanager
    def left_where_it_is(self) -> Iterator[None]:
        """Let :meth:`attach` move nothing for good, as for a save of state that was moved away.

        Afterwards callers find the tensors that they left here, and memory of the device is held
        only by what was made of the attached state meanwhile.
        """
        shards = [shard.data for shard in self.shards]
        states = [dict(state) for state in self._views().states]
        try:
            yield
        finally:
            for shard, data in zip(self.shards, shards, strict=True):
                shard.data = data
            for state, kept in zip(self._views().states, states, strict=True):
                state.clear()
                state.update(kept)

    def put_back(self, state: RankState) -> None:
        """Let all views be those of a state that :meth:`attach` returned, wherever they are now."""
        self._flat_state.point_at(state, self._views())
        self._point_at_weights()

    def move_to(self, device: torch.device | str) -> None:
        """Move all state to a device, in new memory even if it is there; see :meth:`attach`.

        What is in host memory for good stays there.
        """
        self._flat_state.move_to(torch.device(device), self._views())

    def take_weights(self) -> None:
        """Set the main parameters to the model's weights, after these were changed."""
        self._point_at_weights()
        for held in self.attach().everywhere:
            held.take_weights()

    def sort_shards(self, key: Callable[[Piece], Any]) -> None:
        """Order the shards within each group by a key of their pieces; equal keys stay in order."""
        keys = {
            shard: key(piece) for shard, piece in zip(self.shards, self._plan.pieces, strict=True)
        }
        for group in self.param_groups:
            group["params"].sort(key=keys.__getitem__)
        self._params = [list(group["params"]) for group in self.param_groups]

    # What torch's own optimizers offer.

    def exp_avg_sq_per_element(self, shard: Tensor, v: Tensor | None = None) -> Tensor:
        """Return v of every element of a shard, float32, shape ``(n,)``.

        Args:
            shard: one of the shards.
            v: as it is stored; default: that of the shard's state.
        """
        number = next(i for i, own in enumerate(self.shards) if own is shard)
        stored = self.state[shard][EXP_AVG_SQ] if v is None else v
        return v_per_element(self._plan, self._plan.pieces[number], stored)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse new groups: shards, blocks and buffers are planned together at the start."""
        if getattr(self, "_sealed", False):
            raise NotImplementedError(
                "Adam-mini cannot take another parameter group: blocks and their sums over ranks "
                "are planned for all parameters at once. Make the parameters trainable before "
                "get_megatron_optimizer is called, and build the optimizer again."
            )
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> NoReturn:
        """Refuse: a step needs sums over blocks, and norms, that all ranks take part in."""
        raise NotImplementedError(
            "The inner optimizer holds the state of Adam-mini and takes no step of its own; call "
            "step() of the optimizer that get_megatron_optimizer returned, on all ranks."
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take state and groups of :meth:`state_dict`, made by the same rank of the same layout.

        Unlike torch's, it casts nothing to the shard's own type, which would lose bits. An m of 8
        bits may become one of floats, or one of floats codes; floats that are codes stay them.

        Raises:
            ValueError: groups, shards or shapes differ, or one of both stores 16-bit remainders.
        """
        saved = state_dict["param_groups"]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError(
                "The state dict's groups have "
                f"{[len(group['params']) for group in saved]} shards, this optimizer's have "
                f"{[len(group['params']) for group in self.param_groups]}. It loads on the same "
                "rank of the same parallel layout only; for others, use a torch_dist checkpoint."
            )
        states = [
            (shard, state_dict["state"].get(number, {}))
            for group, other in zip(self.param_groups, saved, strict=True)
            for shard, number in zip(group["params"], other["params"], strict=True)
        ]
        self._check_remainders(states)
        for shard, state in states:
            self.state[shard] = self._as_stored(shard, state)
        for group, other in zip(self.param_groups, saved, strict=True):
            group.update({key: value for key, value in other.items() if key != "params"})
        self.attach()

    def _check_remainders(self, states: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> None:
        """Refuse saved states with remainders for float32 shards, and the other way round."""
        with_remainders = {id(self.shards[number]) for number in self._flat_state.with_remainders}
        for shard, saved in states:
            own = id(shard) in with_remainders
            if saved and own != (REMAINDERS in saved):
                with_, without = "has 16-bit remainders", "has none"
                raise ValueError(
                    f"The state dict {without if own else with_} of main parameters "
                    f"({REMAINDERS!r}), and this optimizer {with_ if own else without}. "
                    "Remedy: --adam-mini-param-remainders or --adam-mini-lean in both or none; "
                    "or a checkpoint, which holds float32 and loads into either."
                )

    def _as_stored(self, shard: Tensor, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a saved state of a shard, m as codes of 8 bits if it is stored so, else floats."""
        has_codes = self._flat_state.has_codes
        m, v = saved.get(EXP_AVG), saved.get(EXP_AVG_SQ)
        if m is None or v is None or (are_codes(m) if has_codes else m.dtype != CODES):
            return dict(saved)
        scale = fp8_scale(self.exp_avg_sq_per_element(shard, v)).to(m.device)
        return {**saved, EXP_AVG: to_fp8(m.float(), scale) if has_codes else from_fp8(m, scale)}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: groups, state and integers, but none of Megatron's buffers."""
        return {**self.__dict__, "_buffers": None}

    def _views(self) -> Views:
        """Return the shards and the state of each; one without state gets an empty one."""
        if len(self.state) == len(self.shards) and all(map(operator.is_, self.state, self.shards)):
            return Views(self.shards, list(self.state.values()))
        return Views(self.shards, [self.state.setdefault(shard, {}) for shard in self.shards])

    # Shards that are the model's weights.

    def _weight(self, piece: Piece) -> Tensor:
        return self._buffers[piece.buffer].weight.detach()[piece.window.in_buffer]

    def _point_at_weights(self) -> None:
        for number, is_weight in enumerate(self._is_weight):
            if is_weight:
                self.shards[number].data = self._weight(self._plan.pieces[number])

    @torch.no_grad()
    def _write_weight(self, number: int) -> None:
        """Write a shard that was replaced into the model's weights, and let it be their view."""
        shard, weight = self.shards[number], self._weight(self._plan.pieces[number])
        if shard.data_ptr() == weight.data_ptr() and shard.device == weight.device:
            return
        if shard.shape != weight.shape:
            self._flat_state.refuse_shape(number, SHARD, shard, weight.numel())
        weight.copy_(shard.detach())
        shard.data = weight

    def _check_groups(self) -> None:
        for index, (group, own) in enumerate(zip(self.param_groups, self._params, strict=True)):
            if len(group["params"]) != len(own) or not all(map(operator.is_, group["params"], own)):
                raise ValueError(
                    f"param_groups[{index}]['params'] holds other tensors than Adam-mini's shards. "
                    "Shards are fixed; to replace their values, assign to shard.data."
                )
