"""Functions of Megatron-Core that replacing ``torch.cuda`` cannot fix, changed on import.

Each of them refuses, or silently does something else, for a reason that does not apply to the CPU
host. Nothing of Megatron is imported here: an import hook changes the modules when they load.
"""

import copy
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from megatron_adam_mini.cpu_host.context_attention import attend_over_context

__all__ = ["install"]


def _keep_built_dataset_helper(module: ModuleType) -> None:
    # Rank 0 runs ``make`` for an index builder that the wheel already contains, but without the
    # Makefile. In a source tree without the builder, the original builds it.
    original = module.compile_helpers

    @functools.wraps(original)
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    module.compile_helpers = compile_helpers  # type: ignore[attr-defined]


def _convert_splits_of_cpu_tensors(module: ModuleType) -> None:
    # The original converts only tensors on the GPU to numpy; all_to_all needs the splits as
    # numbers.
    original = module.maybe_move_tensor_to_cpu

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu  # type: ignore[attr-defined]


def mark_torch_norms_as_sequence_parallel(module: ModuleType) -> None:
    """Let torch's norms work with sequence parallelism.

    The original refuses it because it cannot mark torch's norm. Only the mark on its parameters is
    missing: with it, Megatron sums their gradients over the tensor-parallel group.
    """
    norm_class = module.WrappedTorchNorm
    original = norm_class.__new__

    @functools.wraps(original)
    def make_norm(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        config_of_one_rank = copy.copy(config)
        config_of_one_rank.sequence_parallel = False
        norm: torch.nn.Module = original(cls, config_of_one_rank, *args, **kwargs)
        if config.sequence_parallel:
            for parameter in norm.parameters():
                parameter.sequence_parallel = True  # type: ignore[attr-defined]
        return norm

    norm_class.__new__ = make_norm


_CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "megatron.core.datasets.utils": _keep_built_dataset_helper,
    "megatron.core.transformer.dot_product_attention": attend_over_context,
    "megatron.core.transformer.moe.moe_utils": _convert_splits_of_cpu_tensors,
    "megatron.core.transformer.torch_norm": mark_torch_norms_as_sequence_parallel,
}


class _ChangingLoader(importlib.abc.Loader):
    """Loads a module with its own loader, then applies the change."""

    def __init__(self, loader: importlib.abc.Loader, change: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._change = change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._change(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds only the modules that must be changed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        change = _CHANGES.get(fullname)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ChangingLoader(spec.loader, change)
        return spec


def _concerns_this_host(record: logging.LogRecord) -> bool:
    # Megatron forks the GPU's random state for each dropout and warns if the CPU's changes
    # meanwhile. Here they are one generator, which the end of the fork restores.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def install() -> None:
    """Put the hook in front of the import system's finders, and silence one irrelevant warning."""
    sys.meta_path.insert(0, _Finder())
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_concerns_this_host)
