"""Model, GPUs and batch -> every layout, the bytes of its largest rank, and what fits beside them.

Imports the modules before it. Bytes of weights, gradients and state are those of ``memory``. Bytes
of activations come from a function of the caller, as Megatron is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.estimate.memory import Planner, formats_of, largest_rank
from megatron_adam_mini.estimate.models import Model
from megatron_adam_mini.estimate.parallel import Cluster, Parallel, stage_layers
from megatron_adam_mini.estimate.stages import check_fits

#: Takes Megatron's arguments by name, and ``num_microbatches``; returns bytes of a rank.
ActivationEstimate = Callable[[Mapping[str, Any]], int]

#: Context parallelism is tried while each rank keeps that many tokens of a sequence.
_LEAST_TOKENS = 4096
_LARGEST_MICRO_BATCH = 64
#: Flags that say how layers are cut; with one of them, layers are cut so or not at all.
_CUTS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


@dataclass(frozen=True)
class Candidate:
    """A layout, and what its largest rank needs.

    Attributes:
        parallel: the layout.
        totals: exact bytes of weights, gradients and state, by the names of ``memory.FORMATS``.
        activations: estimated bytes by size of the micro-batch; empty: no estimate.
    """

    parallel: Parallel
    totals: Mapping[str, int]
    activations: Mapping[int, int]

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the dense model."""
        return self.parallel.world_size // self.parallel.data_parallel_size

    def fits(self, name: str, gpu_memory: int) -> bool:
        """Return whether the layout fits: with a micro-batch, if its activations are known."""
        if self.activations:
            return self.largest_micro_batch(name, gpu_memory) is not None
        return self.totals[name] <= gpu_memory

    def largest_micro_batch(self, name: str, gpu_memory: int) -> int | None:
        """Return the largest micro-batch with which an optimizer fits, if there is one."""
        free = gpu_memory - self.totals[name]
        return max((size for size, need in self.activations.items() if need <= free), default=None)


def search(
    model: Model,
    cluster: Cluster,
    options: AdamMiniConfig,
    *,
    fixed: Mapping[str, Any] | None = None,
    offload_fraction: float = 0.0,
    activations: ActivationEstimate | None = None,
) -> list[Candidate]:
    """Return all layouts that Megatron takes, those with the fewest model-parallel ranks first.

    Args:
        model: the model.
        cluster: the GPUs and the batch.
        options: of Adam-mini.
        fixed: fields of ``Parallel`` that all layouts have.
        offload_fraction: of Adam-mini's state, in host memory.
        activations: Megatron's estimate; without it, activations are not counted.

    Raises:
        ValueError: there is no layout; says why the last one was refused.
    """
    found = []
    for parallel in layouts(model, cluster, fixed or {}):
        stages = Planner(model, parallel, options).stages(
            parallel, offload_fraction=offload_fraction
        )
        forms = formats_of(parallel).items()
        totals = {name: largest_rank(stages, form)["total"] for name, form in forms}
        estimated = (
            {} if activations is None else _activations(model, cluster, parallel, activations)
        )
        found.append(Candidate(parallel, totals, estimated))
    return sorted(found, key=_order)


def layouts(model: Model, cluster: Cluster, fixed: Mapping[str, Any]) -> Iterator[Parallel]:
    """Yield the layouts of a cluster that Megatron would take; see :func:`search`."""
    reason = "sizes that are given leave no choice"
    none = True
    for sizes in _sizes(model, cluster, fixed):
        try:
            parallel = _layout(model, cluster, fixed, sizes)
        except ValueError as error:
            reason = str(error)
            continue
        none = False
        yield parallel
    if none:
        raise ValueError(
            f"No layout of {cluster.world_size} GPUs is possible; the last was refused: {reason}"
        )


def _sizes(model: Model, cluster: Cluster, fixed: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """Yield combinations of parallel sizes, whether they are possible or not."""
    world, experts = cluster.world_size, model.num_experts or 1

    def choices(name: str, usual: Iterable[int]) -> Iterable[int]:
        return (fixed[name],) if name in fixed else usual

    for tp in choices("tensor_model_parallel_size", _powers(cluster.gpus_per_node)):
        for pp in choices("pipeline_model_parallel_size", _divisors(world)):
            longest = max(cluster.seq_length // _LEAST_TOKENS, 1)
            for cp in choices("context_parallel_size", _powers(longest)):
                for ep in choices("expert_model_parallel_size", _divisors(experts)):
                    yield {
                        "tensor_model_parallel_size": tp,
                        "pipeline_model_parallel_size": pp,
                        "context_parallel_size": cp,
                        "expert_model_parallel_size": ep,
                    }


def _layout(
    model: Model, cluster: Cluster, fixed: Mapping[str, Any], sizes: Mapping[str, int]
) -> Parallel:
    """Return a layout.

    Raises:
        ValueError: Megatron would refuse it.
    """
    tp, cp = sizes["tensor_model_parallel_size"], sizes["context_parallel_size"]
    pp = sizes["pipeline_model_parallel_size"]
    if cluster.world_size % (tp * pp * cp):
        raise ValueError(f"TP {tp} x PP {pp} x CP {cp} does not divide {cluster.world_size} GPUs.")
    dp = cluster.world_size // (tp * pp * cp)
    if cluster.global_batch_size % dp:
        raise ValueError(
            f"--global-batch-size={cluster.global_batch_size} is not divisible by DP {dp}."
        )
    parts = tp * (2 * cp if cp > 1 else 1)  # sequence parallelism, and Megatron's halves for CP
    if cluster.seq_length % parts:
        raise ValueError(f"--seq-length={cluster.seq_length} is not divisible by {parts}.")
    values: dict[str, Any] = {**fixed, **sizes, "data_parallel_size": dp}
    if model.num_experts is not None:
        values.setdefault("expert_tensor_parallel_size", 1)
    if model.num_layers % pp and not any(values.get(name) for name in _CUTS):
        # The last stage has the loss, and gets what is left.
        last = model.num_layers - -(-model.num_layers // pp) * (pp - 1)
        if last < 1:
            raise ValueError(f"{model.num_layers} layers are too few for PP {pp}.")
        values["decoder_last_pipeline_num_layers"] = last
    parallel = Parallel(**values)
    check_fits(model, parallel)
    if any(not layers for stage in stage_layers(parallel, model.num_layers) for layers in stage):
        raise ValueError(f"{model.num_layers} layers are too few for PP {pp}.")
    return parallel


def _activations(
    model: Model, cluster: Cluster, parallel: Parallel, estimate: ActivationEstimate
) -> dict[int, int]:
    """Return estimated bytes of activations by micro-batch."""
    virtual = len(stage_layers(parallel, model.num_layers)[0])
    sequences = cluster.global_batch_size // parallel.data_parallel_size
    found = {}
    for size in _powers(min(sequences, _LARGEST_MICRO_BATCH)):
        if sequences % size:
            break
        found[size] = estimate(
            {
                "seq_length": cluster.seq_length // parallel.context_parallel_size,
                "micro_batch_size": size,
                "num_microbatches": sequences // size,
                "hidden_size": model.hidden_size,
                "ffn_hidden_size": model.active_ffn,
                "num_layers": model.num_layers,
                "padded_vocab_size": model.vocabulary(parallel.tp),
                "tensor_model_parallel_size": parallel.tp,
                "pipeline_model_parallel_size": parallel.pp,
                "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
            }
        )
    return found


def _order(candidate: Candidate) -> tuple[int, ...]:
    parallel = candidate.parallel
    sizes = (parallel.pp, parallel.context_parallel_size, parallel.expert_model_parallel_size)
    return (candidate.model_ranks, *sizes)


def _powers(largest: int) -> list[int]:
    return [2**i for i in range(largest.bit_length())]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
