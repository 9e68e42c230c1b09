"""The parameters of a Llama's rank, and Adam-mini on them without Megatron.

Data flow: sizes -> ``ParameterInfo`` -> one buffer with random gradients and weights -> AdamMini.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_adam_mini.collectives import DomainGroups
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.early_buffers import NO_EARLY_BUFFERS
from megatron_adam_mini.estimate.buckets import plan_stage, stage_blocks
from megatron_adam_mini.estimate.models import Model
from megatron_adam_mini.estimate.parallel import Parallel
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.plan.layout import BucketLayout, BufferLayout, Placement
from megatron_adam_mini.plan.parameter_info import HeadGeometry, ParameterInfo
from megatron_adam_mini.plan.partition import ParameterBlocks, partition_parameter
from megatron_adam_mini.plan.step_plan import DomainLayout, plan_step

HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0

#: Parameters start at multiples of this many elements, as in Megatron's buffers.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Llama:
    """One rank's part of a Llama with SwiGLU; experts come in addition to the layers.

    Attributes:
        tp: tensor-parallel ranks, each with its part of every matrix.
        experts: MLPs of ``expert_ffn`` columns, outside of the layers.
    """

    hidden: int
    layers: int
    ffn: int
    heads: int
    groups: int
    vocab: int
    tp: int = 1
    experts: int = 0
    expert_ffn: int = 0

    def parameters(self) -> list[ParameterInfo]:
        """List the parameters of one rank."""
        h, tp = self.hidden, self.tp
        heads = HeadGeometry(
            num_heads=self.heads // tp, num_query_groups=self.groups // tp, head_dim=h // self.heads
        )
        found = [ParameterInfo(name="embed", shape=(self.vocab // tp, h), role="embedding")]

        def mlp(name: str, ffn: int) -> None:
            found.append(ParameterInfo(name=f"{name}.fc1", shape=(2 * ffn, h), role="mlp"))
            found.append(ParameterInfo(name=f"{name}.fc2", shape=(h, ffn), role="mlp"))

        for i in range(self.layers):
            name = f"layers.{i}"
            found += [
                ParameterInfo(name=f"{name}.norm1", shape=(h,), role="norm"),
                ParameterInfo(
                    name=f"{name}.qkv", shape=(heads.num_rows, h), role="qkv", heads=heads
                ),
                ParameterInfo(name=f"{name}.proj", shape=(h, h // tp), role="attention_projection"),
                ParameterInfo(name=f"{name}.norm2", shape=(h,), role="norm"),
            ]
            mlp(name, self.ffn // tp)
        for i in range(self.experts):
            mlp(f"experts.{i}", self.expert_ffn)
        found.append(ParameterInfo(name="norm", shape=(h,), role="norm"))
        found.append(ParameterInfo(name="lm_head", shape=(self.vocab // tp, h), role="output"))
        return found


@dataclass
class Flat:
    """A buffer as Megatron has them."""

    grad: Tensor
    weight: Tensor

    def values(self, where: slice) -> Tensor:
        """Return a part of the weights."""
        return self.weight[where]


def layout_of(infos: Sequence[ParameterInfo], bucket_size: int | None) -> BufferLayout:
    """Put parameters into one bucket, or into buckets that close at ``bucket_size`` elements."""
    buckets: list[BucketLayout] = []
    placements: list[Placement] = []
    offset = end = 0
    for index, info in enumerate(infos):
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + info.numel
        placements.append(Placement(index, start, end))
        if index == len(infos) - 1 or (bucket_size is not None and end >= bucket_size):
            numel = -(-end // 128) * 128
            buckets.append(BucketLayout(numel, 1, tuple(placements), offset))
            placements, offset, end = [], offset + numel, 0
    return BufferLayout(tuple(buckets))


@dataclass(frozen=True)
class Rank:
    """What a rank updates: its parameters, and buffers that ``dp_size`` ranks share."""

    blocks: list[ParameterBlocks]
    buffers: tuple[BufferLayout, ...]
    dp_rank: int = 0
    dp_size: int = 1

    @classmethod
    def alone(cls, llama: Llama, config: AdamMiniConfig, bucket_size: int | None = None) -> Rank:
        """Return the only rank of a data-parallel group."""
        infos = llama.parameters()
        blocks = [partition_parameter(info, config) for info in infos]
        return cls(blocks, (layout_of(infos, bucket_size),))

    @classmethod
    def one_of(cls, dp: int, model: Model, config: AdamMiniConfig) -> Rank:
        """Return one of ``dp`` ranks of a whole model, with the buckets that Megatron makes."""
        parallel = Parallel(data_parallel_size=dp, overlap_grad_reduce=True)
        plan = plan_stage(
            model, parallel, stage_blocks(model, parallel, config, pp_rank=0), pp_rank=0
        )
        return cls(plan.parameters, tuple(plan.dense), dp_rank=dp // 2, dp_size=dp)


class Rig:
    """Adam-mini on random gradients, and the step that a training loop takes.

    Args:
        rank: what to update.
        config: options of Adam-mini.
        device: where.
        grad_dtype: of the gradients.
        shift: elements by which weights are moved from a 256-byte boundary.
        group: data-parallel group, if ranks share the buffers.

    Attributes:
        optimizer: the optimizer.
        numel: elements that this rank updates.
    """

    def __init__(
        self,
        rank: Rank,
        config: AdamMiniConfig,
        device: torch.device,
        *,
        grad_dtype: torch.dtype = torch.float32,
        shift: int = 0,
        group: Any = None,
    ) -> None:
        generator = torch.Generator(device=device).manual_seed(1)

        def noise(numel: int, dtype: torch.dtype, std: float) -> Tensor:
            found = torch.empty(numel, dtype=dtype, device=device)
            return found.normal_(std=std, generator=generator)

        self._flats = []
        for layout in rank.buffers:
            last = layout.buckets[-1]
            numel = last.offset + last.numel
            weight = noise(numel + shift, torch.bfloat16, 0.02)[shift:]
            self._flats.append(Flat(noise(numel, grad_dtype, 1e-3), weight))
        plan = plan_step(rank.blocks, [DomainLayout("dense", rank.buffers, dp_rank=rank.dp_rank)])
        self.optimizer = AdamMini(
            plan,
            config,
            self._flats,
            [DomainGroups(dp=group)],
            [dict(HYPER)],
            [0] * len(rank.blocks),
            device=device,
        )
        self.numel = sum(shard.numel() for shard in self.optimizer.main_params.shards)
        self.buckets = sum(len(layout.buckets) for layout in rank.buffers)

    def step(self) -> None:
        """Take one step without waiting for the device."""
        optimizer = self.optimizer
        if optimizer.config.single_phase:
            optimizer.sum_squares_of_cut_blocks()
            optimizer.update(_unscaled())
        else:
            optimizer.update(optimizer.decide(optimizer.sum_squares(), clip_grad=CLIP))
        optimizer.main_params.step_count += 1

    def graphed(self) -> Callable[[], None]:
        """Return the same step, whose launches are captured in a CUDA graph now; takes one first.

        The host writes the numbers of each step into pinned memory, which the graph copies.
        """
        self.step()  # makes tables and groups
        optimizer, graph = self.optimizer, torch.cuda.CUDAGraph()
        state, decision = optimizer.main_params.attach(), _unscaled()
        torch.cuda.synchronize()
        with torch.no_grad(), torch.cuda.graph(graph):
            if optimizer.config.single_phase:
                optimizer.sum_squares_of_cut_blocks()
            else:
                decision = optimizer.decide(optimizer.sum_squares(), clip_grad=CLIP)
            if isinstance(decision.grad_scale, Tensor):
                optimizer.scalars.grad_scale = decision.grad_scale
            optimizer._advance(state, decision, NO_EARLY_BUFFERS)

        def step() -> None:
            optimizer.hyper.write(optimizer.scalars, decision.grad_scale)
            graph.replay()
            optimizer.main_params.step_count += 1

        return step

    def bits(self) -> list[Tensor]:
        """Return copies of state and weights, as bits."""
        tensors = self.optimizer.main_params.attach().flat_tensors()
        tensors += [flat.weight for flat in self._flats]
        return [tensor.detach().clone().view(torch.int16) for tensor in tensors]

    def shapes(self, rank: Rank) -> list[tuple[int, ...]]:
        """Return the shapes that torch's optimizers would have: parameters, or shards of them."""
        if rank.dp_size == 1:
            return [blocks.info.shape for blocks in rank.blocks]
        return [tuple(shard.shape) for shard in self.optimizer.main_params.shards]

    def bytes_per_parameter(self) -> float:
        """Return the bytes of memory that a step must move, per parameter.

        Read g (twice unless in a single phase), read and write m and main parameter, write the
        weight; remainders: read and write remainder and weight. Read and write v where there is
        one per element; one v per block is next to nothing.
        """
        optimizer = self.optimizer
        grad = self._flats[0].grad.element_size()
        m = 2 * (2 if optimizer.config.exp_avg_dtype == "bf16" else 4)
        param = 8 if optimizer.config.param_remainders else 10
        v = 8 * optimizer.plan.num_elementwise / self.numel
        return (1 if optimizer.config.single_phase else 2) * grad + m + param + v


def _unscaled() -> Any:
    from megatron_adam_mini.decision import Decision

    return Decision()


class TorchPipeline:
    """What torch offers: norm, clip, an optimizer on float32 main parameters, bfloat16 weights.

    Args:
        shapes: of the parameters.
        device: where.
        make: from parameters to optimizer; default ``AdamW(fused=True)``.
    """

    #: Read g for the norm; read and write g to clip; AdamW reads g, and reads and writes p, m, v;
    #: the copy reads p and writes the weight.
    BYTES = 4 + 8 + 4 + 24 + 6

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        device: torch.device,
        make: Callable[[list[Tensor]], Any] | None = None,
    ) -> None:
        self.masters = [torch.randn(s, device=device).mul_(0.02).requires_grad_() for s in shapes]
        self.weights = [m.detach().bfloat16() for m in self.masters]
        self.grads = [torch.randn(s, device=device).mul_(1e-3) for s in shapes]
        for master, grad in zip(self.masters, self.grads, strict=True):
            master.grad = grad
        self.optimizer = make(self.masters) if make else _fused(self.masters)
        self.numel = sum(grad.numel() for grad in self.grads)

    @torch.no_grad()
    def step(self) -> None:
        """Take one step without waiting for the device."""
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.grads)))
        torch._foreach_mul_(self.grads, (CLIP / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        torch._foreach_copy_(self.weights, [m.detach() for m in self.masters])


def _fused(masters: list[Tensor]) -> Any:
    return torch.optim.AdamW(masters, fused=True, **HYPER)
