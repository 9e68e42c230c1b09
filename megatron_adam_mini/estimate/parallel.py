"""How a job's ranks are divided, which layers each stage holds, and the GPUs of a cluster.

Standard library only. Attributes have the names of Megatron's flags.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """A layout of ranks and its gradient buckets; see Megatron's flags of these names.

    Raises:
        ValueError: sizes are inconsistent.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    num_distributed_optimizer_instances: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    num_virtual_stages_per_pipeline_rank: int | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    overlap_grad_reduce: bool = False
    ddp_bucket_size: int | None = None
    ddp_num_buckets: int | None = None
    ddp_pad_buckets_for_high_nccl_busbw: bool = False
    grad_reduce_in_bf16: bool = False
    fp8_param_gather: bool = False

    def __post_init__(self) -> None:
        """Check that the sizes are positive and divide as Megatron requires."""
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{flag(name)}={value} is not allowed; it must be at least 1.")
        if self.world_size % self.expert_ranks:
            raise ValueError(
                f"{self.world_size} ranks are not divisible by expert-tensor x expert x pipeline "
                f"parallel sizes = {self.etp} x {self.expert_model_parallel_size} x {self.pp} = "
                f"{self.expert_ranks}; change --expert-model-parallel-size, "
                "--expert-tensor-parallel-size or --data-parallel-size."
            )
        for kind, shards in (
            ("data x context", self.data_parallel_with_context),
            ("expert-data", self.world_size // self.expert_ranks),
        ):
            if shards % self.num_distributed_optimizer_instances:
                raise ValueError(
                    f"{shards} {kind} parallel ranks are not divisible by "
                    "--num-distributed-optimizer-instances="
                    f"{self.num_distributed_optimizer_instances}; choose a divisor."
                )
        virtual = (
            self.num_virtual_stages_per_pipeline_rank,
            self.num_layers_per_virtual_pipeline_stage,
        )
        if None not in virtual:
            raise ValueError(
                "--num-virtual-stages-per-pipeline-rank and "
                "--num-layers-per-virtual-pipeline-stage say the same thing; give one of them."
            )
        if virtual != (None, None) and self.pp == 1:
            raise ValueError(
                "Virtual pipeline stages need --pipeline-model-parallel-size of at least 2; "
                "raise it or leave the virtual stages out."
            )

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline-parallel size."""
        return self.pipeline_model_parallel_size

    @property
    def etp(self) -> int:
        """Expert-tensor-parallel size; Megatron's default is the tensor-parallel size."""
        return self.expert_tensor_parallel_size or self.tp

    @property
    def expert_ranks(self) -> int:
        """Number of ranks that hold one copy of the experts."""
        return self.etp * self.expert_model_parallel_size * self.pp

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.context_parallel_size * self.data_parallel_size

    @property
    def dense_shards(self) -> int:
        """Number of ranks that share the optimizer state of a dense parameter."""
        return self.data_parallel_with_context // self.num_distributed_optimizer_instances

    @property
    def expert_shards(self) -> int:
        """Number of ranks that share the optimizer state of an expert parameter."""
        return self.world_size // self.expert_ranks // self.num_distributed_optimizer_instances

    @property
    def experts_have_own_groups(self) -> bool:
        """Whether expert parameters are reduced over other groups than dense ones."""
        return self.expert_model_parallel_size > 1 or self.etp != self.tp

    @property
    def data_parallel_with_context(self) -> int:
        """Number of ranks by which Megatron's default bucket size grows."""
        return self.data_parallel_size * self.context_parallel_size


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs, and the batch that they train on.

    Attributes:
        gpu_memory: bytes of one GPU.
        world_size: all GPUs.
        gpus_per_node: tensor parallelism goes no further.
        seq_length: tokens of a sequence.
        global_batch_size: sequences of a step.

    Raises:
        ValueError: a number is not positive.
    """

    gpu_memory: int
    world_size: int
    gpus_per_node: int
    seq_length: int
    global_batch_size: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{flag(name)}={value} is not allowed; it must be at least 1.")


def flag(name: str) -> str:
    """Return Megatron's flag for an attribute."""
    return "--" + name.replace("_", "-")


def stage_layers(parallel: Parallel, num_layers: int) -> list[list[range]]:
    """Return the layers of each virtual stage of each pipeline stage, counted from 0.

    Raises:
        ValueError: the layers do not divide as Megatron requires.

    Source: megatron.core.transformer.transformer_block.get_num_layers_to_build.
    """
    per_rank = _layers_per_stage(parallel, num_layers)
    virtual = _virtual_stages(parallel, per_rank)
    for layers in per_rank:
        if layers % virtual:
            raise ValueError(
                f"A pipeline stage of {layers} layers (embedding and loss included where they "
                f"count) cannot be cut into {virtual} virtual stages; choose a divisor of {layers}."
            )
    sizes = [[layers // virtual] * virtual for layers in per_rank]
    # If embedding and loss count as layers in the split, each takes the place of one.
    sizes[0][0] -= parallel.account_for_embedding_in_pipeline_split
    sizes[-1][-1] -= parallel.account_for_loss_in_pipeline_split
    if min(min(stage) for stage in sizes) < 0:
        raise ValueError(
            f"{num_layers} layers are too few for this pipeline: a stage would hold less than its "
            "embedding or loss. Use fewer stages."
        )
    # Virtual stages go round-robin: the first of every rank, then the second of every rank.
    found: list[list[range]] = [[] for _ in sizes]
    layer = 0
    for chunk in range(virtual):
        for stage, layers_of in enumerate(sizes):
            found[stage].append(range(layer, layer + layers_of[chunk]))
            layer += layers_of[chunk]
    return found


def _layers_per_stage(parallel: Parallel, num_layers: int) -> list[int]:
    """Return layers per pipeline stage, including embedding and loss if they count as layers."""
    pp = parallel.pp
    first, last = (
        parallel.decoder_first_pipeline_num_layers,
        parallel.decoder_last_pipeline_num_layers,
    )
    counted = (
        parallel.account_for_embedding_in_pipeline_split
        + parallel.account_for_loss_in_pipeline_split
    )
    if first is None and last is None:
        if (num_layers + counted) % pp:
            raise ValueError(
                f"{num_layers} layers{' and embedding or loss' if counted else ''} are not "
                f"divisible by --pipeline-model-parallel-size={pp}; choose a divisor of "
                f"{num_layers + counted}, give --decoder-first-pipeline-num-layers and "
                "--decoder-last-pipeline-num-layers, or count the embedding and the loss as "
                "layers with --account-for-embedding-in-pipeline-split and "
                "--account-for-loss-in-pipeline-split."
            )
        return [(num_layers + counted) // pp] * pp
    if counted:
        raise ValueError(
            "--account-for-*-in-pipeline-split and --decoder-*-pipeline-num-layers exclude each "
            "other in Megatron; give one kind."
        )
    uneven = [value for value in (first, last) if value is not None]
    middle_stages, middle_layers = pp - len(uneven), num_layers - sum(uneven)
    if middle_layers < 0 or middle_stages < 0 or (middle_stages == 0 and middle_layers):
        raise ValueError(
            f"--decoder-first-pipeline-num-layers={first} and "
            f"--decoder-last-pipeline-num-layers={last} do not make {num_layers} layers on {pp} "
            "pipeline stages; change them."
        )
    if middle_stages and middle_layers % middle_stages:
        raise ValueError(
            f"{middle_layers} layers are left for the {middle_stages} other pipeline stages and "
            "are not divisible by them; change --decoder-first-pipeline-num-layers or "
            "--decoder-last-pipeline-num-layers."
        )
    middle = [middle_layers // middle_stages] * middle_stages if middle_stages else []
    return [
        *([] if first is None else [first]),
        *middle,
        *([] if last is None else [last]),
    ]


def _virtual_stages(parallel: Parallel, per_rank: list[int]) -> int:
    layers = parallel.num_layers_per_virtual_pipeline_stage
    if layers is None:
        return parallel.num_virtual_stages_per_pipeline_rank or 1
    if len(set(per_rank)) > 1:
        raise ValueError(
            "--num-layers-per-virtual-pipeline-stage needs equal pipeline stages; use "
            "--num-virtual-stages-per-pipeline-rank with uneven ones."
        )
    if per_rank[0] % layers:
        raise ValueError(
            f"{per_rank[0]} layers of a pipeline stage are not divisible by "
            f"--num-layers-per-virtual-pipeline-stage={layers}; choose a divisor."
        )
    return per_rank[0] // layers
