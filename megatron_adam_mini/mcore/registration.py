"""Adam-mini behind Megatron's names: which of its functions are wrapped, and how to undo it.

Imports megatron.core, and megatron.training if it is there. Eight functions are replaced, all
of which Megatron looks up as module globals at call time, so it does not matter who imported their
callers before:

* ``megatron.core.optimizer._get_megatron_emerging_optimizer``: where ``get_megatron_optimizer``
  sends every optimizer that is neither Adam nor SGD;
* ``megatron.core.dist_checkpointing.load``, ``load_common_state_dict`` and
  ``load_content_metadata``: look for damage and foreign code before anything is read;
* ``megatron.training.arguments.add_megatron_arguments``: adds the flags;
* ``megatron.training.arguments.validate_args``: checks ours, then lets Megatron validate as for
  Adam. For any other name it would turn the distributed optimizer into the layer-wise one;
* ``megatron.training.training.get_megatron_optimizer_config``: carries the options along;
* ``megatron.training.training.training_log``: adds Adam-mini's metrics to the logs.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import optimizer as mcore_optimizer

from megatron_adam_mini.mcore.arguments import (
    OPTIMIZER,
    add_arguments,
    check_arguments,
    config_from_args,
    refuse_stray_options,
)
from megatron_adam_mini.mcore.compat import warn_if_untested
from megatron_adam_mini.mcore.factory import build_optimizer
from megatron_adam_mini.mcore.load_guard import wrap_load, wrap_load_common
from megatron_adam_mini.mcore.metrics import wrap_training_log
from megatron_adam_mini.mcore.preflight import refuse_keywords

logger = logging.getLogger(__name__)


class Registration:
    """Handle that :func:`register` returns; ``undo()`` restores Megatron's functions.

    Also a context manager that undoes itself.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def replace(self, module: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        """Put ``wrap(original)`` in the place of ``module.name``."""
        original = getattr(module, name)
        wrapper = wrap(original)
        setattr(module, name, wrapper)
        self._replaced.append((module, name, original, wrapper))

    def undo(self) -> None:
        """Restore what was replaced; harmless when called again.

        Raises:
            RuntimeError: somebody wrapped a function after us, so restoring would drop theirs.
        """
        for module, name, _, wrapper in self._replaced:
            if getattr(module, name) is not wrapper:
                raise RuntimeError(
                    f"{module.__name__}.{name} was replaced after megatron_adam_mini.register(); "
                    "undo the later replacement first."
                )
        for module, name, original, _ in reversed(self._replaced):
            setattr(module, name, original)
        self._replaced.clear()
        global _active
        if _active is self:
            _active = None

    def __enter__(self) -> Registration:
        """Return the handle."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Undo the registration."""
        self.undo()


_active: Registration | None = None


def register() -> Registration:
    """Make ``optimizer="adam_mini"`` known to Megatron; idempotent.

    Returns:
        A handle; every call returns the same one until it is undone.
    """
    global _active
    # First, because a patched tree (see patches/) registers while it is imported.
    arguments = _optional_module("megatron.training.arguments")
    if _active is not None:
        return _active
    warn_if_untested()
    handle = Registration()
    handle.replace(mcore_optimizer, "_get_megatron_emerging_optimizer", _wrap_factory)
    handle.replace(dist_checkpointing, "load", wrap_load)
    handle.replace(dist_checkpointing, "load_common_state_dict", wrap_load_common)
    handle.replace(dist_checkpointing, "load_content_metadata", wrap_load_common)
    if arguments is not None:
        defaults: dict[str, Any] = {}
        handle.replace(arguments, "add_megatron_arguments", functools.partial(_wrap_add, defaults))
        handle.replace(arguments, "validate_args", functools.partial(_wrap_validate, defaults))
        training = importlib.import_module("megatron.training.training")
        handle.replace(training, "get_megatron_optimizer_config", _wrap_config)
        handle.replace(training, "training_log", wrap_training_log)
    _active = handle
    return handle


def _optional_module(name: str) -> Any:
    """Import a module of megatron.training, or return ``None`` where only megatron.core is."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("megatron.training", name):
            raise
        return None


def _wrap_factory(original: Callable[..., Any]) -> Callable[..., Any]:
    defaults = {
        name: parameter.default
        for function in (mcore_optimizer.get_megatron_optimizer, original)
        for name, parameter in inspect.signature(function).parameters.items()
    }

    @functools.wraps(original)
    def get_emerging_optimizer(
        config: Any,
        model_chunks: Any,
        config_overrides: Any = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> Any:
        if config.optimizer != OPTIMIZER:
            return original(config, model_chunks, config_overrides, pg_collection, **kwargs)
        refuse_keywords(kwargs, defaults)
        return build_optimizer(config, model_chunks, config_overrides, pg_collection)

    return get_emerging_optimizer


def _wrap_add(defaults: dict[str, Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_arguments(original(parser))
        defaults.update(
            {
                action.dest: (action.option_strings[0], action.default)
                for action in parser._actions
                if action.dest.startswith("adam_mini_")
            }
        )
        return parser

    return add_megatron_arguments


def _wrap_validate(defaults: dict[str, Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def validate_args(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        if args.optimizer != OPTIMIZER:
            refuse_stray_options(args, defaults)
            return original(args, *rest, **kwargs)
        check_arguments(args)
        args.optimizer = "adam"
        try:
            return original(args, *rest, **kwargs)
        finally:
            args.optimizer = OPTIMIZER

    return validate_args


def _wrap_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_megatron_optimizer_config(args: argparse.Namespace) -> Any:
        if args.optimizer != OPTIMIZER:
            return original(args)
        # Megatron's config allows another dtype with Transformer Engine's Adam only.
        megatrons = argparse.Namespace(**vars(args) | {"exp_avg_dtype": torch.float32})
        config, overrides = original(megatrons)
        config.adam_mini = config_from_args(args)
        return config, overrides

    return get_megatron_optimizer_config
