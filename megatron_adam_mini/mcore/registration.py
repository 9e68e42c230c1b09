"""Registration with Megatron: which of its functions are wrapped, and how to undo it.

Imports ``compat``, which names the functions and their releases, and the wrappers' modules.
Sixteen functions are replaced, those of megatron.training only if it is installed:

* the optimizer factory builds Adam-mini if the config names it;
* MIMO models are refused;
* a checkpoint that is saved says what its optimizer state is, and a load asks for what is there;
* before each of three functions reads a checkpoint, its files are checked for damage and foreign
  code;
* a scheduler that loads a schedule, and is told to use the checkpoint's values, uses them for
  the groups of Adam-mini, too;
* the optimizer's config may ask for fewer bits without Transformer Engine's Adam;
* QK-clip of each of two kinds of attention scales Adam-mini's main parameters;
* Adam-mini's flags are added to the parser;
* Adam-mini's flags are validated, then Megatron validates all others as for Adam: for any other
  optimizer it would replace the distributed optimizer by the layer-wise one;
* the options are attached to the optimizer's config;
* Adam-mini's metrics are added to the logs;
* the norm of the parameters is computed from main parameters that Megatron cannot read;
* the logged theoretical memory is Adam-mini's.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from megatron_adam_mini.mcore import compat
from megatron_adam_mini.mcore.arguments import (
    OPTIMIZER,
    add_arguments,
    check_arguments,
    config_from_args,
    refuse_stray_options,
)
from megatron_adam_mini.mcore.checkpoint_calls import wrap_load, wrap_load_content, wrap_save
from megatron_adam_mini.mcore.compat import Hook
from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer
from megatron_adam_mini.mcore.factory import build_optimizer
from megatron_adam_mini.mcore.load_guard import wrap_load_common
from megatron_adam_mini.mcore.low_precision import PLAIN, report_ignored_dtype, wrap_config_check
from megatron_adam_mini.mcore.metrics import (
    wrap_params_norm,
    wrap_state_memory,
    wrap_training_log,
)
from megatron_adam_mini.mcore.preflight import refuse_keywords
from megatron_adam_mini.mcore.preflight_model import refuse_mimo
from megatron_adam_mini.mcore.qk_clip import wrap_clip_qk

#: What is read of a call that builds an optimizer.
BUILD_ARGUMENTS = ("config", "model_chunks", "config_overrides", "pg_collection")


class Registration:
    """Handle that :func:`register` returns; ``undo()`` restores Megatron's functions.

    Also a context manager, which calls ``undo()`` at its end.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def replace(self, hook: Hook, wrap: Callable[[Any], Any]) -> None:
        """Put ``wrap(original)`` in the place of a function of Megatron."""
        original = getattr(hook.place(), hook.name)
        wrapper = wrap(original)
        for place in hook.places():
            setattr(place, hook.name, wrapper)
            self._replaced.append((place, hook.name, original, wrapper))

    def undo(self) -> None:
        """Restore what was replaced; a second call does nothing.

        Raises:
            RuntimeError: a function was wrapped again since; restoring it would drop that wrapper.
        """
        for place, name, _, wrapper in self._replaced:
            if getattr(place, name) is not wrapper:
                raise RuntimeError(
                    f"{place.__name__}.{name} was replaced after megatron_adam_mini.register(); "
                    "undo the later replacement first."
                )
        for place, name, original, _ in reversed(self._replaced):
            setattr(place, name, original)
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
    training = compat.optional_module(compat.ADD_ARGUMENTS.module)
    if _active is not None:
        return _active
    compat.warn_if_untested()
    handle = Registration()
    handle.replace(compat.FACTORY, _wrap_factory)
    if compat.optional_module(compat.MIMO.module) is not None:  # since 0.17
        handle.replace(compat.MIMO, _wrap_mimo)
    handle.replace(compat.CHECKPOINT_SAVE, wrap_save)
    handle.replace(compat.CHECKPOINT_LOAD, wrap_load)
    handle.replace(compat.CHECKPOINT_COMMON, wrap_load_common)
    handle.replace(compat.CHECKPOINT_CONTENT, wrap_load_content)
    handle.replace(compat.SCHEDULER_LOAD, _wrap_scheduler)
    handle.replace(compat.CONFIG_CHECK, functools.partial(wrap_config_check, optimizer=OPTIMIZER))
    handle.replace(compat.CLIP_QK, wrap_clip_qk)
    handle.replace(compat.CLIP_LATENT_QK, wrap_clip_qk)
    if training is not None:
        defaults: dict[str, Any] = {}
        handle.replace(compat.ADD_ARGUMENTS, functools.partial(_wrap_add, defaults))
        handle.replace(compat.VALIDATE_ARGUMENTS, functools.partial(_wrap_validate, defaults))
        handle.replace(compat.OPTIMIZER_CONFIG, _wrap_config)
        handle.replace(compat.TRAINING_LOG, wrap_training_log)
        handle.replace(compat.PARAMS_NORM, wrap_params_norm)
        handle.replace(compat.STATE_MEMORY, wrap_state_memory)
    _active = handle
    return handle


def _wrap_factory(original: Callable[..., Any]) -> Callable[..., Any]:
    defaults = compat.factory_defaults(original)

    @functools.wraps(original)
    def get_optimizer(*args: Any, **kwargs: Any) -> Any:
        given = compat.factory_arguments(original, args, kwargs)
        # Who has imported this function by name keeps it when the registration is undone.
        if _active is None or given["config"].optimizer != OPTIMIZER:
            return original(*args, **kwargs)
        read = [given.pop(name, None) for name in BUILD_ARGUMENTS]
        refuse_keywords(given, defaults)
        return build_optimizer(*read)

    return get_optimizer


def _wrap_mimo(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_mimo_optimizer(mimo_model: Any, config: Any) -> Any:
        if config.optimizer == OPTIMIZER:
            refuse_mimo()
        return original(mimo_model, config)

    return get_mimo_optimizer


def _wrap_scheduler(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(scheduler: Any, state_dict: dict[str, Any]) -> Any:
        # Before, because it sets the rates at once, from each group's bounds if it has some.
        if scheduler.use_checkpoint_opt_param_scheduler:
            optimizer = scheduler.optimizer
            for member in getattr(optimizer, "chained_optimizers", [optimizer]):
                if isinstance(member, AdamMiniOptimizer):
                    member.take_bounds_of_checkpoint()
        return original(scheduler, state_dict)

    return load_state_dict


def _wrap_add(defaults: dict[str, Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_arguments(original(parser))
        compat.repair_help(parser)
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
        # Megatron offloads its own Adam only, and only with Transformer Engine's options.
        offload, args.optimizer_cpu_offload = args.optimizer_cpu_offload, False
        args.optimizer = "adam"
        try:
            return original(args, *rest, **kwargs)
        finally:
            args.optimizer, args.optimizer_cpu_offload = OPTIMIZER, offload

    return validate_args


def _wrap_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_megatron_optimizer_config(args: argparse.Namespace) -> Any:
        if args.optimizer != OPTIMIZER:
            return original(args)
        # Other dtypes are options of Adam-mini, and not every release takes other names.
        megatrons = argparse.Namespace(**vars(args) | PLAIN | {"optimizer": "adam"})
        config, overrides = original(megatrons)
        config.optimizer = OPTIMIZER
        config.adam_mini = config_from_args(args)
        report_ignored_dtype(args)  # the config has lost it
        return config, overrides

    return get_megatron_optimizer_config
