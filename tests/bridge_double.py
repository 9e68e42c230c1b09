"""The parts of Megatron-Bridge that an optimizer's config meets, in own words.

Bridge needs much that the suite does not install. Here are its classes as
``megatron_adam_mini.mcore.bridge`` imports them, and what Bridge does to a config: it is written as
``{"_target_": class, field: value}``, made from that again, overridden field by field, finalized,
and asked for the optimizer. ``tools/bridge_check.py`` runs the real ones.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import ModuleType
from typing import Any

import torch

#: Prefixes of classes that may be made from YAML.
allowed = {"megatron.", "torch."}


def install() -> None:
    """Make the modules importable in this process, once."""
    if "megatron.bridge" in sys.modules:
        return
    from megatron.core.optimizer import OptimizerConfig as MegatronsConfig

    @dataclass
    class OptimizerConfig(MegatronsConfig):
        def __post_init__(self) -> None:
            pass  # values change until finalize()

        def finalize(self) -> None:
            super().__post_init__()

    @dataclass
    class CallbackContext:
        state: Any
        optimizer: Any = None

    class Callback:
        def on_train_step_end(self, context: CallbackContext) -> None:
            pass

    contents: dict[str, dict[str, Any]] = {
        "megatron.bridge": {},
        "megatron.bridge.training": {},
        "megatron.bridge.training.callbacks": {
            "Callback": Callback,
            "CallbackContext": CallbackContext,
        },
        "megatron.bridge.training.config": {"OptimizerConfig": OptimizerConfig},
        "megatron.bridge.utils": {},
        "megatron.bridge.utils.instantiate_utils": {
            "register_allowed_target_prefix": lambda prefix: allowed.add(f"{prefix}.")
        },
    }
    for name, content in contents.items():
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        for value in content.values():
            if isinstance(value, type):
                value.__module__, value.__qualname__ = name, value.__name__


def to_text(config: Any) -> str:
    """Write a config as Bridge writes ``run_config.yaml``: Megatron's container says of what."""
    from megatron.training.config.container import ConfigContainerBase

    def dtype(value: Any) -> dict[str, Any]:
        return {"_target_": str(value), "_call_": False}

    return json.dumps(ConfigContainerBase._convert_value_to_dict(config), default=dtype)


def from_text(text: str) -> Any:
    """Make a config of such a text; as in Bridge, unknown fields are dropped silently."""

    def make(node: Any) -> Any:
        if isinstance(node, list):
            return [make(item) for item in node]
        if not isinstance(node, dict):
            return node
        target = node.pop("_target_")
        if not target.startswith(tuple(allowed)):
            raise ValueError(f"{target} is not allowed")
        module, name = target.rsplit(".", 1)
        found = getattr(importlib.import_module(module), name)
        if not node.pop("_call_", True):
            return found
        known = {field.name for field in fields(found) if field.init}
        return found(**{key: make(value) for key, value in node.items() if key in known})

    return make(json.loads(text))


def override(config: Any, changes: Mapping[str, Any]) -> None:
    """Change fields as Hydra's overrides do: all are written again, tuples as lists."""
    assert set(changes) <= {field.name for field in fields(config)}
    for field in fields(config):
        before = getattr(config, field.name)
        assert not is_dataclass(before)
        value = changes.get(field.name, before)
        if isinstance(before, torch.dtype) and isinstance(value, str):
            value = getattr(torch, value.removeprefix("torch."))
        setattr(config, field.name, list(value) if isinstance(value, tuple) else value)


def setup_optimizer(
    config: Any, schedule: Mapping[str, Any], model: Any, overrides: Any, pg_collection: Any = None
) -> tuple[Any, Any]:
    """Build the optimizer, then its scheduler, as Bridge does.

    Args:
        config: of the optimizer, finalized.
        schedule: arguments of the scheduler.
        model: chunks.
        overrides: function of the config that returns overrides by ``ParamKey``.
        pg_collection: process groups, if they are not Megatron's global ones.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = config.provide(
        model_chunks=model,
        config_overrides=overrides(config),
        use_gloo_process_groups=pg_collection is None,
        pg_collection=pg_collection,
    )
    scheduler = OptimizerParamScheduler(
        optimizer, max_lr=config.lr, min_lr=config.min_lr, **schedule
    )
    return optimizer, scheduler
