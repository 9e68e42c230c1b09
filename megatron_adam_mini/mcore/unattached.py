"""Options of Adam-mini where Megatron's config comes without them: frameworks that build it.

Imports ``arguments``. Data flow: config, or arguments kept, or ``ADAM_MINI_FLAGS`` -> options ->
``factory``.
"""

from __future__ import annotations

import argparse
import os
import shlex
from typing import Any, NoReturn

from megatron_adam_mini.config import EXP_AVG_DTYPES, AdamMiniConfig
from megatron_adam_mini.mcore.arguments import OPTIMIZER, add_arguments, config_from_args

VARIABLE = "ADAM_MINI_FLAGS"

_kept: AdamMiniConfig | None = None


def keep(options: AdamMiniConfig) -> None:
    """Use these options in this process from now on."""
    global _kept
    _kept = options


def options_of(config: Any) -> AdamMiniConfig:
    """Return the options that come with Megatron's config, or else those of this process.

    Raises:
        TypeError: the config has something else in their place.
        ValueError: as :func:`options_of_process`.
    """
    found = getattr(config, "adam_mini", None)
    if found is None:
        return options_of_process()
    if not isinstance(found, AdamMiniConfig):
        raise TypeError(
            f"adam_mini of the optimizer's config is {found!r}; it must be an AdamMiniConfig, such "
            "as AdamMiniConfig(preset='row'). Remedy for a dict of options: AdamMiniConfig(**dict)."
        )
    return found


def options_of_process() -> AdamMiniConfig:
    """Return the options that were kept, or else those of the environment, or else the defaults.

    Raises:
        ValueError: the environment has a flag that is not known, a value that is not allowed, or
            flags although options were kept.
    """
    flags = os.environ.get(VARIABLE, "")
    if _kept is None:
        return _parse(flags)
    if flags.strip():
        raise ValueError(
            f"{VARIABLE}={flags!r} would be ignored, because register_with was given the arguments "
            "of the command line, whose options this process uses. Remedy: unset the variable, and "
            "give its flags on the command line."
        )
    return _kept


def _parse(flags: str) -> AdamMiniConfig:
    def fail(message: str) -> NoReturn:
        raise ValueError(
            f"{VARIABLE}={flags!r} is not allowed: {message}. It takes --adam-mini-* and "
            "--exp-avg-dtype, as on Megatron's command line."
        )

    parser = argparse.ArgumentParser(prog=VARIABLE, add_help=False, allow_abbrev=False)
    parser.error = fail  # type: ignore[method-assign]
    parser.add_argument("--optimizer", choices=["adam"], default=OPTIMIZER, help=argparse.SUPPRESS)
    parser.add_argument("--exp-avg-dtype", choices=EXP_AVG_DTYPES, default="fp32")
    try:
        words = shlex.split(flags)
    except ValueError as error:
        fail(str(error))
    return config_from_args(add_arguments(parser).parse_args(words))
