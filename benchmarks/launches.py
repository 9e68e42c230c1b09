"""Count what a step of one rank launches on a GPU, without a GPU.

    python -m benchmarks.plan_scale launches      # of large plans, in seconds

The optimizer runs on tensors without memory (torch's ``meta`` device) with the Triton wrappers, and
every launch is recorded instead of done: Triton's, torch's own small kernels and copies, and
collectives. What is counted is ``AdamMini``'s step with clipping, from reduced gradients to new
weights, and the copy of the decision; Megatron's own collectives and the zeroing of gradients are
not. On a GPU, NCCL may turn one collective into several launches, and torch some of its operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_adam_mini.collectives import DomainGroups
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.decision import Decision
from megatron_adam_mini.estimate.buckets import plan_stage, stage_blocks
from megatron_adam_mini.estimate.models import Model
from megatron_adam_mini.estimate.parallel import Parallel
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.plan.layout import BucketLayout, BufferLayout, Placement
from megatron_adam_mini.plan.step_plan import DENSE, EXPERT, DomainLayout, StepPlan, plan_step

_META = torch.device("meta")
#: Two groups, as Megatron makes them: with and without weight decay.
_GROUPS = [
    {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay} for decay in (0.1, 0.0)
]


class Launches(NamedTuple):
    """Launches of one step.

    Attributes:
        triton: of the kernels of this package.
        torch: torch's kernels and copies.
        collectives: of the step, the norm's included.
        names: how often each was launched.
        table_bytes: of the launch tables.
    """

    triton: int
    torch: int
    collectives: int
    names: Counter[str]
    table_bytes: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.triton + self.torch + self.collectives


class _Buffer:
    """A buffer without memory."""

    def __init__(self, numel: int, grad_dtype: torch.dtype = torch.float32) -> None:
        self.grad = torch.empty(numel, dtype=grad_dtype, device=_META)
        self.weight = torch.empty(numel, dtype=torch.bfloat16, device=_META)

    def values(self, where: slice) -> Tensor:
        """Return a part of the weights."""
        return self.weight[where]


class _Done:
    """A collective that is over."""

    def wait(self) -> None:
        """Do nothing."""


class Recorder(TorchDispatchMode):
    """Counts operations of torch that launch something on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, _: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("detach", "empty", "empty_like", "new_empty"):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def rank_plan(
    model: Model,
    parallel: Parallel,
    options: AdamMiniConfig | None = None,
    *,
    stage: int = 0,
    place: float = 0.5,
    distributed_optimizer: bool = True,
) -> StepPlan:
    """Plan the step of one rank of a whole model.

    Args:
        model: the model.
        parallel: the layout.
        options: of Adam-mini.
        stage: pipeline stage.
        place: of the rank in its data-parallel groups, from 0 to 1.
        distributed_optimizer: whether ranks share buckets; else each parameter is a buffer.
    """
    chunks = stage_blocks(model, parallel, options or AdamMiniConfig(), pp_rank=stage)
    found = plan_stage(model, parallel, chunks, pp_rank=stage)
    replicas = parallel.num_distributed_optimizer_instances > 1
    if not distributed_optimizer:
        whole = tuple(
            BufferLayout((BucketLayout(n, 1, (Placement(index, 0, n),)),))
            for index, n in enumerate(blocks.info.numel for blocks in found.parameters)
        )
        return plan_step(found.parameters, [DomainLayout(DENSE, whole, 0, 0, parallel.tp, True)])
    domains = [
        DomainLayout(name, tuple(buffers), int(place * shards), 0, tp, replicas)
        for name, buffers, shards, tp in (
            (DENSE, found.dense, parallel.dense_shards, parallel.tp),
            (EXPERT, found.expert, parallel.expert_shards, parallel.etp),
        )
        if name == DENSE or model.num_experts is not None
    ]
    return plan_step(found.parameters, domains)


def count_launches(plan: StepPlan, options: AdamMiniConfig | None = None) -> Launches:
    """Count the launches of a step that is neither the first one nor skipped."""
    optimizer = without_memory(plan, options)
    names: Counter[str] = Counter()

    def launch(kernel: Any, programs: int, *_: Any, **__: Any) -> None:
        if programs:
            names[f"triton {kernel.fn.__name__}"] += 1

    with alone(optimizer, names), patch.object(optimizer.kernels, "launch", launch):
        step(optimizer)  # makes the launch tables
        names.clear()
        recorder = Recorder()
        with recorder:
            step(optimizer)
    own, collectives = (
        sum(n for name, n in names.items() if name.startswith(kind)) for kind in ("triton", "dist")
    )
    if not optimizer.config.single_phase:
        recorder.names["copy of the decision"] = 1
    return Launches(
        own,
        sum(recorder.names.values()),
        collectives,
        names + recorder.names,
        optimizer.state_bytes()["launch_tables"],
    )


def without_memory(plan: StepPlan, options: AdamMiniConfig | None = None) -> AdamMini:
    """Return an optimizer on tensors without memory, with Triton's kernels."""
    from megatron_adam_mini.kernels import triton_gpu

    buffers = [
        _Buffer(layout.buckets[-1].offset + layout.buckets[-1].numel)
        for domain in plan.domains
        for layout in domain.buffers
    ]
    decays = [int(len(blocks.info.shape) == 1) for blocks in plan.parameters]
    with patch("megatron_adam_mini.optimizer.select_backend", lambda *_: triton_gpu):
        return AdamMini(
            plan,
            options or AdamMiniConfig(),
            buffers,
            [DomainGroups()] * len(plan.domains),
            [dict(group) for group in _GROUPS],
            decays,
            device=_META,
        )


@contextmanager
def alone(optimizer: AdamMini, names: Counter[str]) -> Iterator[None]:
    """Let the optimizer step without other ranks; collectives are counted, and not done."""

    def collective(name: str) -> Any:
        def call(*_: Any, **__: Any) -> _Done:
            names[f"distributed {name}"] += 1
            return _Done()

        return call

    # Addresses tell whether the state is where it was; tensors without memory have none.
    state = optimizer.main_params.attach()
    used = ("all_reduce", "all_gather_into_tensor", "all_to_all_single")
    with (
        patch.object(optimizer.main_params, "attach", lambda: state),
        patch.object(optimizer.kernels, "on_device_of", lambda _: nullcontext()),
        patch.object(distributed, "is_initialized", lambda: True),
        patch.multiple(distributed, **{name: collective(name) for name in used}),
    ):
        yield


@torch.no_grad()
def step(optimizer: AdamMini) -> None:
    """Take a step with clipping, unless the optimizer is of a single phase."""
    if optimizer.config.single_phase:
        optimizer.sum_squares_of_cut_blocks()
        optimizer.update(Decision())
    else:
        optimizer.update(optimizer.decide(optimizer.sum_squares(), clip_grad=1.0))
