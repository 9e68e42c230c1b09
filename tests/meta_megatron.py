"""What Megatron makes of a command line on any rank of any layout, without the memory or the ranks.

Parameters and buffers live on torch's meta device, process groups are torch's fake ones: a process
stands for each rank in turn, and takes milliseconds for it. The rest is Megatron's own: its parser
and validation, its process groups, its model builder and its DDP with the buckets of the
distributed optimizer. Only ``--transformer-impl local`` can be built without a GPU.

Runs in a process of its own that has imported ``tests.preload``.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import distributed

from megatron_adam_mini.plan.layout import BufferLayout
from megatron_adam_mini.plan.parameter_info import ParameterInfo


@dataclass(frozen=True)
class Rank:
    """What one rank holds.

    Attributes:
        pp_rank: its pipeline stage.
        tp_rank: its place in the tensor-parallel group.
        expert_tp_rank: its place in that of experts.
        parameters: of all its virtual stages; placements index into them.
        dense: buffers of dense parameters.
        expert: buffers of experts that have groups of their own.
        dense_slice: number of the slice of each dense bucket that it owns.
        expert_slice: the same for experts' buckets.
    """

    pp_rank: int
    tp_rank: int
    expert_tp_rank: int
    parameters: list[ParameterInfo]
    dense: list[BufferLayout]
    expert: list[BufferLayout]
    dense_slice: int
    expert_slice: int


def ranks_of(flags: Sequence[str], world_size: int, ranks: Sequence[int]) -> list[Rank]:
    """Return what Megatron builds on some ranks of a job with these flags."""
    logging.disable(logging.WARNING)  # Megatron lists every bucket
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        args = _arguments(flags, world_size)
        return [_rank(args, world_size, rank) for rank in ranks]


def _arguments(flags: Sequence[str], world_size: int) -> Any:
    """Let Megatron parse and validate a command line; the ranks of a job all get the same."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_adam_mini.cpu_host import with_cpu_flags

    command = [
        *("--micro-batch-size", "1", "--lr", "1e-3", "--train-iters", "1", "--bf16"),
        *("--use-distributed-optimizer", "--no-initialization", *flags),
    ]
    environment = {"WORLD_SIZE": str(world_size), "RANK": "0", "LOCAL_RANK": "0"}
    with (
        mock.patch.object(sys, "argv", ["pretrain_gpt.py", *with_cpu_flags(command)]),
        mock.patch.dict(os.environ, environment),
    ):
        args = parse_args()
        validate_args(args)
    return args


def _rank(args: Any, world_size: int, rank: int) -> Rank:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_adam_mini.mcore import param_info
    from megatron_adam_mini.mcore.slices import sharded_buffers

    with _process_groups(args, world_size, rank):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        chunks = _model(args, groups)
        # Experts are described here before the optimizer takes them.
        with mock.patch.object(param_info, "_refuse_unsupported"):
            infos = param_info.collect_parameters(
                chunks, tp_group=groups.tp, expert_tp_group=groups.expt_tp
            )
        index_of = {param: number for number, param in enumerate(infos)}
        layouts = []
        for buffers, group in (
            ([b for c in chunks for b in c.buffers], groups.intra_dp_cp),
            ([b for c in chunks for b in c.expert_parallel_buffers], groups.intra_expt_dp),
        ):
            assert all(buffer.data_parallel_group is group for buffer in buffers)
            layouts.append(sharded_buffers(buffers, index_of, group.size())[0])
        return Rank(
            groups.pp.rank(),
            groups.tp.rank(),
            groups.expt_tp.rank(),
            # The key is where Megatron's checkpoints have the parameter: no matter of memory.
            [replace(info, key="") for info in infos.values()],
            *layouts,
            groups.intra_dp_cp.rank(),
            groups.intra_expt_dp.rank(),
        )


@contextmanager
def _process_groups(args: Any, world_size: int, rank: int) -> Iterator[None]:
    """Be one rank of a job."""
    from megatron.core import parallel_state

    distributed.init_process_group("fake", rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


def _model(args: Any, groups: Any) -> list[Any]:
    """Build this rank's model chunks on the meta device, wrapped in DDP."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.training import get_megatron_ddp_config

    with ExitStack() as stack:
        meta = stack.enter_context(torch.device("meta"))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=meta))
        # It has no parameters, and for context parallelism and latent attention no local form.
        stack.enter_context(
            mock.patch.object(
                DotProductAttention,
                "__init__",
                lambda self, *_, **__: torch.nn.Module.__init__(self),
            )
        )
        return GPTModelBuilder(gpt_config_from_args(args)).build_distributed_models(
            groups, get_megatron_ddp_config(args), data_parallel_random_init=False
        )
