"""What depends on the release of Megatron-Core: private names, probes, functions that are wrapped.

Imports megatron.core, and megatron.training only if it is installed. For a new release, check this
module and ``slices``, which reads DDP's buffers. Statements about releases come from the sources of
0.16.1, 0.17.1, 0.18.2, 0.19.2 and main (0.20); "all" means these. ``tools/releases.sh`` runs tests
on each.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import __version__ as MCORE_VERSION  # noqa: N812 (a constant)
from megatron.core import optimizer as mcore_optimizer
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.layers import (
    copy_tensor_model_parallel_attributes,
    param_is_not_tensor_parallel_duplicate,
)
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.nn import Module, Parameter

#: Releases that ``tools/releases.sh`` ran on, oldest first; 0.20.0 is main, not released yet.
TESTED_VERSIONS = ("0.16.1", "0.17.1", "0.18.2", "0.19.2", "0.20.0")
#: The one that the whole test-suite runs on.
SUITE_VERSION = "0.19.2"
#: What Megatron-LM's tag core_v0.19.0 calls itself; no file that Adam-mini reads or wraps differs
#: from that of 0.19.2.
SAME_AS_SUITE_VERSION = "0.19.1"

logger = logging.getLogger(__name__)


def refuse_unsupported_release() -> None:
    """Check that Megatron-Core has what this module needs and cannot do without.

    Raises:
        ImportError: the release is too old, or lacks it for another reason.
    """
    getter = getattr(mcore_optimizer, "get_megatron_optimizer", None)
    needed = {
        "get_megatron_optimizer with config_overrides": getter is not None
        and "config_overrides" in inspect.signature(getter).parameters,
        "_get_param_groups": hasattr(mcore_optimizer, "_get_param_groups"),
        "checkpoint_fully_reshardable_formats": hasattr(
            DistributedOptimizer, "checkpoint_fully_reshardable_formats"
        ),
    }
    missing = [name for name, found in needed.items() if not found]
    if missing:
        raise ImportError(
            f"megatron-adam-mini does not support megatron-core {MCORE_VERSION}, which has no "
            f"{', no '.join(missing)}; allowed are {', '.join(TESTED_VERSIONS)}. Remedy: install "
            f"megatron-core=={SUITE_VERSION}."
        )


refuse_unsupported_release()


class Hook(NamedTuple):
    """A function of Megatron that ``registration`` wraps.

    Megatron looks it up at call time, as a global of its module or in its class, so its callers may
    have been imported before.
    """

    module: str
    name: str
    owner: str = ""  # class in the module
    imported: bool = False  # by name, into modules that call it

    def place(self) -> Any:
        """Return the module or class that holds the function."""
        module = importlib.import_module(self.module)
        return getattr(module, self.owner) if self.owner else module

    def places(self) -> list[Any]:
        """Return :meth:`place`, and the modules that have imported the function from there."""
        place = self.place()
        if not self.imported:
            return [place]
        function = vars(place)[self.name]
        others = [
            module
            for module in list(sys.modules.values())
            # What stands there need not be a module: None forbids an import.
            if module is not place and getattr(module, "__dict__", {}).get(self.name) is function
        ]
        return [place, *others]


#: Builds the optimizer. Since 0.18, ``get_megatron_optimizer`` calls a private function for all
#: that is neither Adam nor SGD. Before, there is only the getter itself, which
#: megatron.training.training and scripts import by name.
FACTORY = (
    Hook("megatron.core.optimizer", "_get_megatron_emerging_optimizer")
    if hasattr(mcore_optimizer, "_get_megatron_emerging_optimizer")
    else Hook("megatron.core.optimizer", "get_megatron_optimizer", imported=True)
)
#: Saves a checkpoint. Public; all.
CHECKPOINT_SAVE = Hook("megatron.core.dist_checkpointing", "save")
#: Loads a checkpoint; the next two read its common state before that. Public; all.
CHECKPOINT_LOAD = Hook("megatron.core.dist_checkpointing", "load")
CHECKPOINT_COMMON = Hook("megatron.core.dist_checkpointing", "load_common_state_dict")
CHECKPOINT_CONTENT = Hook("megatron.core.dist_checkpointing", "load_content_metadata")
#: Loads a schedule, or checks that it is this run's. Public; all.
SCHEDULER_LOAD = Hook(
    "megatron.core.optimizer_param_scheduler", "load_state_dict", "OptimizerParamScheduler"
)
#: Adds all flags to a parser. Public; all that have megatron.training.
ADD_ARGUMENTS = Hook("megatron.training.arguments", "add_megatron_arguments")
#: Checks arguments. Public; all. Since 0.18 it switches off the distributed optimizer for every
#: optimizer that is neither Adam nor SGD.
VALIDATE_ARGUMENTS = Hook("megatron.training.arguments", "validate_args")
#: Makes the optimizer's config from arguments. Public; all, but before 0.18 it raises for unknown
#: optimizers.
OPTIMIZER_CONFIG = Hook("megatron.training.training", "get_megatron_optimizer_config")
#: Computes what --log-params-norm logs; of bfloat16 parameters it reads ``main_param`` and
#: ``main_param_sharded``. Public; all that have megatron.training.
PARAMS_NORM = Hook("megatron.training.training", "calc_params_l2_norm")
#: Bytes of weights, gradients and Adam's state on the fullest rank, by a formula. Public; all that
#: have megatron.training.
STATE_MEMORY = Hook(
    "megatron.training.theoretical_memory_usage", "compute_weight_and_optimizer_memory"
)
#: Checks the optimizer's config. All; up to 0.17 configs of Adam have a class below it.
CONFIG_CHECK = Hook("megatron.core.optimizer.optimizer_config", "__post_init__", "OptimizerConfig")
#: Scale rows of Query and Key, one layer each. Public; all.
CLIP_QK = Hook("megatron.core.transformer.attention", "clip_qk", "SelfAttention")
CLIP_LATENT_QK = Hook(
    "megatron.core.transformer.multi_latent_attention", "clip_qk", "MLASelfAttention"
)
#: Builds an optimizer for each module of a MIMO model. Public; all.
MIMO = Hook("megatron.core.models.mimo.optimizer", "get_mimo_optimizer")
#: Writes the logs. Public; all, with more arguments since 0.18.
TRAINING_LOG = Hook("megatron.training.training", "training_log")


def warn_if_untested() -> None:
    """Warn, once per registration, if this release of Megatron-Core was not tested."""
    # Megatron-Core appends the commit of any git folder that contains it: 0.19.2+c943483.
    if MCORE_VERSION.partition("+")[0] not in (*TESTED_VERSIONS, SAME_AS_SUITE_VERSION):
        logger.warning(
            "megatron-adam-mini was tested with megatron-core %s, but this is %s. Run "
            "`tools/releases.sh` of megatron-adam-mini with it before a long run, or install "
            "megatron-core==%s.",
            ", ".join(TESTED_VERSIONS),
            MCORE_VERSION,
            SUITE_VERSION,
        )


# megatron.training.


def optional_module(name: str) -> Any:
    """Import a module of megatron.training, or return ``None`` if only megatron.core is installed.

    The wheels contain megatron.training since 0.17; before, only a source tree does.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("megatron.training", name):
            raise
        return None


def training_arguments() -> Any:
    """Return the arguments that megatron.training has parsed, ``None`` if there are none.

    ``get_args`` would raise then. ``_GLOBAL_ARGS`` is private; all.
    """
    variables = sys.modules.get("megatron.training.global_vars")
    return getattr(variables, "_GLOBAL_ARGS", None)


def repair_help(parser: Any) -> None:
    """Escape (in place) the bare ``%`` in a help text that makes ``--help`` raise.

    0.18.2 and 0.19.2 have one, 0.17.1 has none. The private names here are argparse's.
    """
    for action in parser._actions:
        if action.help:
            try:
                parser._get_formatter()._expand_help(action)
            except (TypeError, ValueError):
                action.help = action.help.replace("%", "%%")


def argument_reader(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a function that takes the arguments of a call and returns the one named ``name``.

    Its position among the arguments may differ between releases.
    """
    signature = inspect.signature(function)

    def read(*args: Any, **kwargs: Any) -> Any:
        return signature.bind(*args, **kwargs).arguments[name]

    return read


def bind(function: Callable[..., Any], *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """Return the arguments of a call by name, defaults included, to read, change and pass on."""
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    return call


# Configs and process groups.


def grad_norm_skip_threshold(config: Any) -> float:
    """Return the gradient norm above which a step is skipped; infinite if there is none.

    A field of ``OptimizerConfig`` since 0.18; no release has a flag for it yet.
    """
    return float(getattr(config, "grad_norm_skip_threshold", math.inf))


def factory_defaults(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the defaults of the keyword arguments with which optimizers are built.

    Since 0.18 :data:`FACTORY` is passed no more than four arguments; ``get_megatron_optimizer``
    takes two more.
    """
    return {
        name: parameter.default
        for function in (mcore_optimizer.get_megatron_optimizer, factory)
        for name, parameter in inspect.signature(function).parameters.items()
    }


def factory_arguments(
    factory: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call of :data:`FACTORY` by name, also those that it does not know.

    Whether there are gloo groups is left out: before 0.18 the getter takes it; they are looked for
    where they are needed.
    """
    known = inspect.signature(factory).parameters
    given = {**dict(zip(known, args, strict=False)), **kwargs}
    return {
        name: value
        for name, value in given.items()
        if name != "use_gloo_process_groups" or name not in known
    }


def param_groups_of(
    model_chunks: Sequence[Any], config: Any, overrides: Mapping[Any, Any] | None
) -> list[dict[str, Any]]:
    """Call Megatron to sort parameters into groups; all ranks of the job must call it.

    ``_get_param_groups`` is private; all, with this signature.
    """
    groups: list[dict[str, Any]] = mcore_optimizer._get_param_groups(
        list(model_chunks), config, overrides
    )
    return groups


def check_overrides(name: str, param: Parameter, overrides: Mapping[Any, Any]) -> None:
    """Check that :func:`param_groups_of` can combine the overrides of a parameter.

    ``ParamKey.matches`` and ``combine_param_group_overrides``; all.

    Raises:
        ValueError: two of them contradict each other.
        TypeError: a value cannot tell groups apart, as it has no hash.
    """
    found = [values for key, values in overrides.items() if key.matches(param, name)]
    hash(tuple(mcore_optimizer.combine_param_group_overrides(found).items()))


def expert_tp_group(groups: Any) -> ProcessGroup:
    """Return the tensor-parallel group of experts.

    ``ProcessGroupCollection.expt_tp``; all. A collection made by a caller lacks the fields that it
    was not given.
    """
    group: ProcessGroup = getattr(groups, "expt_tp", None) or groups.tp
    return group


def sharing_group(chunk: Any, *, expert: bool) -> ProcessGroup:
    """Return the data-parallel ranks that share the state of a DDP-wrapped chunk's parameters.

    With several optimizer instances those within one of them: DDP has already added the gradients
    of the others. ``intra_dp_cp_group`` and ``intra_expt_dp_group``; all.
    """
    group: ProcessGroup = chunk.intra_expt_dp_group if expert else chunk.intra_dp_cp_group
    return group


def norm_group(groups: Any) -> ProcessGroup | None:
    """Return the ranks of one distributed-optimizer instance, ``None`` for all ranks of the job.

    ``ProcessGroupCollection.intra_dist_opt``; all. May be missing or ``None`` in a collection made
    by a caller.
    """
    group: ProcessGroup | None = getattr(groups, "intra_dist_opt", None)
    return group


def gloo_group_like(dp_group: ProcessGroup) -> ProcessGroup | None:
    """Return Megatron's gloo group of the same data-parallel ranks, ``None`` if there is none.

    ``get_data_parallel_group_gloo`` and ``get_expert_data_parallel_group_gloo`` assert that they
    were made; all.
    """
    made: dict[Callable[..., Any], dict[str, bool]] = {
        parallel_state.get_data_parallel_group_gloo: {
            "with_context_parallel": True,
            "partial_data_parallel": True,
        },
        parallel_state.get_expert_data_parallel_group_gloo: {"partial_expert_data_parallel": True},
    }
    for get_group, which in made.items():
        with contextlib.suppress(AssertionError):
            group: ProcessGroup = get_group(**which)
            if get_process_group_ranks(group) == get_process_group_ranks(dp_group):
                return group
    return None


# Parameters and modules.


def is_not_tp_duplicate(
    param: Parameter, tp_group: ProcessGroup, expert_tp_group: ProcessGroup
) -> bool:
    """Return whether this rank's copy of a parameter counts in sums over tensor parallelism.

    ``param_is_not_tensor_parallel_duplicate`` takes the group of experts since 0.19.
    """
    groups: dict[str, Any] = {"tp_group": tp_group, "expert_tp_group": expert_tp_group}
    known = inspect.signature(param_is_not_tensor_parallel_duplicate).parameters
    return bool(
        param_is_not_tensor_parallel_duplicate(
            param, **{key: value for key, value in groups.items() if key in known}
        )
    )


def copy_attributes(shard: Tensor, param: Parameter) -> None:
    """Copy to a shard what Megatron reads from its parameter: how it is split, shared and clipped.

    ``copy_tensor_model_parallel_attributes``; all. The other three by name, since Megatron has a
    function for them since 0.19 only.
    """
    copy_tensor_model_parallel_attributes(shard, param)
    for name in ("allreduce", "shared", "grad_norm_group"):
        if hasattr(param, name):
            setattr(shard, name, getattr(param, name))


def has_norm_of_its_own(param: Parameter) -> bool:
    """Return whether the main gradient norm leaves a parameter out: since 0.19, for MTP."""
    return getattr(param, "grad_norm_group", None) is not None


def is_sharded_by_gtp(param: Parameter) -> bool:
    """Return whether generalized tensor parallelism shards a parameter: since 0.19."""
    return bool(getattr(param, "is_gtp_weight_remat", False))


def stored_prefixes(module: Module) -> Mapping[str, str]:
    """Return how checkpoints rename the parameters of a layer, by prefix within it.

    ``submodules_config.sharded_state_dict_keys_map`` of transformer layers; all. Since 0.17 the
    layer for multi-token prediction calls its own layer otherwise than checkpoints of GPT do.
    Mamba's mixer keeps the keys of a convolution that it no longer has as a module.
    """
    if getattr(module, "mtp_layer_pattern", "") is None:
        return {"mtp_model_layer.": "transformer_layer."}
    if hasattr(module, "conv1d_weight"):  # Mamba's mixer
        return {"conv1d_weight": "conv1d.weight", "conv1d_bias": "conv1d.bias"}
    submodules = getattr(module, "submodules_config", None)
    prefixes: Mapping[str, str] = getattr(submodules, "sharded_state_dict_keys_map", {})
    return prefixes


# Buffers and tables of the distributed optimizer.


def bucket_groups(chunk: Any) -> list[Any]:
    """Return all groups of buckets of a DDP-wrapped chunk; all."""
    groups: list[Any] = [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]
    return groups


def start_reduction(bucket_group: Any, start: Callable[[], Any]) -> Callable[[], Any] | None:
    """Call ``start_grad_sync``; return what lets the current stream wait for what it started.

    ``grad_reduce_handle``, which several streams may wait for; with several optimizer instances it
    is never set, and the collectives are on ``communication_stream``; all.

    Returns:
        ``None`` if nothing was started that is still in flight.
    """
    before = bucket_group.grad_reduce_handle
    start()
    if bucket_group.ddp_config.num_distributed_optimizer_instances > 1:
        stream = bucket_group.communication_stream
        return lambda: torch.cuda.current_stream().wait_stream(stream)
    handle = bucket_group.grad_reduce_handle
    return None if handle is before else lambda: handle.wait()


def finish_gather(bucket_group: Any) -> bool:
    """Wait for the parameter gather of buckets that is in flight, if there is one.

    ``param_gather_handle`` and ``param_gather_dispatched``; all.

    Returns:
        Whether the last one was started after the last backward pass, so that no forward pass
        starts another one.
    """
    if bucket_group.param_gather_handle is not None:
        bucket_group.start_param_sync(force_sync=True)
    return bool(bucket_group.param_gather_dispatched)


def gather_again(chunk: Any) -> None:
    """Let the next forward pass of a DDP-wrapped chunk start its parameter gather; since 0.19."""
    reset = getattr(chunk, "reset_param_sync_dispatch_state", None)
    if reset is not None:
        reset()


#: Checkpoint formats that load under any layout; all.
RESHARDABLE_FORMATS: set[str] = DistributedOptimizer.checkpoint_fully_reshardable_formats
#: Whether Megatron's Adam writes ``fully_reshardable`` state as it holds it, also behind a bucket
#: that is padded at its end. Since 0.20 (#5077) it counts the padding, in a variable of this name.
WRITES_SOUND_RESHARDABLE: bool = "cumulative_padding_stripped" in (
    DistributedOptimizer.sharded_param_state_fully_reshardable.__code__.co_varnames
)
#: Lays out parameters in buffers, a static method; since 0.19.
PARAM_LAYOUT: Any = vars(DistributedOptimizer).get("compute_full_param_layout")


def owned_ranges(buffer: Any) -> dict[tuple[Any, Any], list[dict[str, Any]]]:
    """Return what this rank owns of a buffer: ``_build_gbuf_range_map``."""
    found: dict[tuple[Any, Any], list[dict[str, Any]]]
    found = DistributedOptimizer._build_gbuf_range_map(buffer)
    return found


def buffer_of_params(ranges: Sequence[Any]) -> dict[Parameter, tuple[int, Any, int]]:
    """Return where each parameter of :func:`owned_ranges` is: ``_build_model_param_gbuf_map``."""
    found: dict[Parameter, tuple[int, Any, int]]
    found = DistributedOptimizer._build_model_param_gbuf_map(ranges)
    return found


def owned_by_group(
    groups: Sequence[Any], ranges: Sequence[Any]
) -> tuple[dict[Parameter, tuple[int, int]], list[dict[str, Any]]]:
    """Return group and place of each such parameter: ``_build_optimizer_group_ranges``."""
    index, by_group = DistributedOptimizer._build_optimizer_group_ranges(groups, ranges)
    return index, by_group
