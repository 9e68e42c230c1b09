"""Adam-mini as a ``torch.optim.Optimizer``.

Imports torch, ``config``, ``agreement``, ``kernels`` and the modules before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from megatron_adam_mini.agreement import PlanRecord, agree_on_plan
from megatron_adam_mini.config import AdamMiniConfig, check_adam_values
from megatron_adam_mini.kernels import select_backend
from megatron_adam_mini.standalone.block_sums import complete_
from megatron_adam_mini.standalone.blocks import Blocks
from megatron_adam_mini.standalone.gradients import take_gradients
from megatron_adam_mini.standalone.local_shard import LocalShard
from megatron_adam_mini.standalone.partition import (
    is_trained,
    matched_patterns,
    partition_groups,
    refuse_unmatched,
    warn_of_unknown,
)
from megatron_adam_mini.standalone.scalar_pool import ScalarPool

#: Options that a parameter group cannot have.
_OF_THE_OPTIMIZER = {"preset", "value_as_block", "full_v", "rules", "backend", "process_group"}
#: Options of ``torch.optim.AdamW`` that would change the step, and that there is nothing like here.
_MISSING = ("amsgrad", "maximize")
#: What a parameter group says of the model; a loaded state does not change it.
_OF_THE_MODEL = ("param_names", "num_heads", "num_query_groups", "head_dim")


class AdamMini(Optimizer):
    """AdamW whose second moment v is one number per block of parameters.

    Args:
        params: ``model.named_parameters()``, or groups whose ``params`` are pairs of name and
            parameter. Blocks follow from names.
        lr, betas, eps, weight_decay: as of ``torch.optim.AdamW``; a group may have its own.
        num_heads: attention heads (of Query). A group may have its own, like the next two.
        num_query_groups: heads of Key and Value; default: ``num_heads``.
        head_dim: rows of a head; default: from the shapes of Query and Key.
        preset, value_as_block, full_v, backend: see :class:`~megatron_adam_mini.AdamMiniConfig`.
        rules: ``{pattern of names: "row" | "column" | "head" | "tensor" | "element"}``, first
            match wins; ``{"*": "tensor"}`` is the paper's Algorithm 3, for models that are no
            Transformers.
        process_group: ranks that make this optimizer together, such as all stages of a pipeline:
            what one of them refuses is refused on all, and a rule must match on one of them.

    Raises:
        ValueError, TypeError, NotImplementedError: a value, dtype or layout that is not allowed;
            the message names the value, the allowed ones and the remedy.
        RuntimeError: another rank of ``process_group`` refuses something, or has other options.

    Source: Zhang et al., arXiv:2406.16793, Algorithms 1 to 3; decoupled weight decay of Loshchilov
    and Hutter, arXiv:1711.05101.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        num_heads: int | None = None,
        num_query_groups: int | None = None,
        head_dim: int | None = None,
        preset: str = "paper",
        value_as_block: bool = False,
        full_v: tuple[str, ...] = (),
        rules: Mapping[str, str] | None = None,
        backend: str = "auto",
        process_group: distributed.ProcessGroup | None = None,
    ) -> None:
        self.config = AdamMiniConfig(
            preset=preset,
            value_as_block=value_as_block,
            full_v=full_v,
            rules=tuple((rules or {}).items()),
            backend=backend,
        )
        self._process_group = process_group
        self._shards: dict[Tensor, LocalShard] = {}
        self._scalars = ScalarPool()
        self._made = False
        values = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        heads = {"num_heads": num_heads, "num_query_groups": num_query_groups}
        super().__init__(params, {**values, **heads, "head_dim": head_dim})
        self._check()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; all ranks that share a parameter must call it.

        Equations, with g the gradient and b its block::

            v_b <- beta2 v_b + (1 - beta2) mean(g_b * g_b)
            m   <- beta1 m + (1 - beta1) g
            p   <- p - lr * weight_decay * p
            p   <- p - lr / (1 - beta1^t) * m / (sqrt(v_b / (1 - beta2^t)) + eps)

        A parameter without a gradient stays as it is, and so does its state; one that ranks share
        has a gradient if any of them has, see :func:`take_gradients`.

        Args:
            closure: computes gradients anew, and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shards = self._local_shards()
        gradients = take_gradients({param: s.blocks.name for param, s in shards.items()})
        # sum(g_b * g_b): of this rank's part of b, then of all of b
        for param, shard in shards.items():
            shard.sum_squares_(gradients.get(param))
        complete_(shard.sums for shard in shards.values() if shard.sums is not None)
        # v_b, m and p
        self._scalars.begin_step()
        for group in self.param_groups:
            for param in group["params"]:
                if param in gradients:
                    state = self.state[param] = self.state[param] or shards[param].new_state()
                    state["step"] += 1
                    shards[param].update_(state, self._scalars.of(group, state["step"], param))
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see ``torch.optim.Optimizer``. A parameter that comes twice counts once.

        Raises:
            ValueError, TypeError, NotImplementedError: as the class.
        """
        params = param_group["params"]
        if not isinstance(params, Tensor | set):
            unique = {
                id(item[1] if isinstance(item, tuple) else item): item for item in [*params][::-1]
            }
            param_group["params"] = list(unique.values())[::-1]
        if misplaced := sorted(_OF_THE_OPTIMIZER & param_group.keys()):
            raise ValueError(
                f"A parameter group has {', '.join(misplaced)}, which all groups share; give it to "
                "AdamMini(...) itself. A group may have lr, betas, eps, weight_decay, num_heads, "
                "num_query_groups and head_dim."
            )
        _refuse_missing(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_adam_values(**{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})
            if self._made:
                self._check()
        except Exception:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state of the same partition; see ``torch.optim.Optimizer``.

        Raises:
            ValueError: it is the state of another partition, layout or optimizer.
        """
        own = [{key: group[key] for key in _OF_THE_MODEL} for group in self.param_groups]
        saved = {p: state_dict["state"].get(number) for number, p in self._numbered(state_dict)}
        # torch would cast v to the dtype of the parameter, and take over names and heads. What is
        # frozen now may be trained later.
        shards = self._shards_of(lambda param: bool(saved.get(param)))
        adopted = {param: shard.adopt(saved[param]) for param, shard in shards.items()}
        super().load_state_dict(state_dict)
        self.state.update(adopted)
        for group, kept in zip(self.param_groups, own, strict=True):
            group.update(kept)

    def load_adamw_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``torch.optim.AdamW``: v becomes its mean over each block, which is exact.

        Rates and the like are loaded, too. All ranks that share a parameter must call it.

        Args:
            state_dict: AdamW's, of the same parameters in the same groups, sharded as they are.

        Raises:
            ValueError: it is no such state.
            NotImplementedError: AdamW had options that this optimizer does not have.
        """
        for group in state_dict["param_groups"]:
            _refuse_missing(group)
            if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
                raise NotImplementedError(
                    f"The state has weight_decay={group['weight_decay']} of torch.optim.Adam, "
                    "which adds it to the gradient; AdamMini decays as AdamW does. Remedy: "
                    "set weight_decay of its groups to 0, and that of AdamMini after loading."
                )
        numbers = {p: number for number, p in self._numbered(state_dict)}
        saved = state_dict["state"]
        shards = self._shards_of(lambda param: numbers.get(param) in saved)
        converted = {numbers[p]: shard.from_adamw(saved[numbers[p]]) for p, shard in shards.items()}
        self.load_state_dict({**state_dict, "state": converted})

    def _numbered(self, state_dict: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
        """Yield each parameter with its number in a state dict."""
        params = (param for group in self.param_groups for param in group["params"])
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        yield from zip(numbers, params, strict=False)  # torch checks the lengths

    def manifest(self) -> list[dict[str, Any]]:
        """Return name, shape, rule and number of second moments of each parameter."""
        return [shard.blocks.manifest_entry() for shard in self._local_shards().values()]

    def _check(self) -> None:
        """Refuse what cannot be updated, and list what is not known."""
        if self._process_group is None:
            blocks, _ = self._plan()
            refuse_unmatched(blocks, self.config)
        else:
            patterns = [pattern for pattern, _ in self.config.overrides()]
            blocks = agree_on_plan(self._plan, patterns=patterns, group=self._process_group)
        warn_of_unknown(blocks, self.config)
        # accelerate exchanges parameters before the first step, and whole ones take much memory.
        self._shards, self._made = {}, True

    def _plan(self) -> tuple[dict[Tensor, Blocks], PlanRecord]:
        blocks = partition_groups(self.param_groups, self.config)
        self._shards_of(is_trained, blocks)  # not kept: what cannot be made is an error now
        matched = matched_patterns(blocks, self.config)
        return blocks, PlanRecord(rules=asdict(self.config), matched=matched)

    def _local_shards(self) -> dict[Tensor, LocalShard]:
        """Return what this rank holds, made anew if parameters were replaced or moved."""
        params = [p for group in self.param_groups for p in group["params"] if is_trained(p)]
        if any(param not in self._shards or self._shards[param].moved for param in params):
            self._shards = self._shards_of(is_trained)
        return self._shards

    def _shards_of(
        self, wanted: Callable[[Tensor], bool], blocks: Mapping[Tensor, Blocks] | None = None
    ) -> dict[Tensor, LocalShard]:
        if blocks is None:
            blocks = partition_groups(self.param_groups, self.config)
        return {
            param: LocalShard(param, made, select_backend(self.config.backend, param.device))
            for param, made in blocks.items()
            if wanted(param)
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._shards, self._scalars, self._made = {}, ScalarPool(), True
        self._process_group = None  # of the processes that it was made in


def _refuse_missing(group: Mapping[str, Any]) -> None:
    if asked := [name for name in _MISSING if group.get(name)]:
        raise NotImplementedError(
            f"A parameter group asks for {' and '.join(asked)}, which AdamMini does not have. "
            "Remedy: leave it out, or torch.optim.AdamW for these parameters."
        )
