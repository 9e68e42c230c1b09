"""Adam-mini in the workers of frameworks that build Megatron's config themselves.

Importing this module registers Adam-mini, for frameworks that import what they are told to. Where
they have no field for ``config.adam_mini``, options come from the environment:

    ADAM_MINI_FLAGS="--adam-mini-preset first --adam-mini-param-remainders"
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_adam_mini.mcore import unattached
from megatron_adam_mini.mcore.arguments import OPTIMIZER, config_from_args
from megatron_adam_mini.mcore.registration import register

register()


def register_with(args: argparse.Namespace | Any) -> None:
    """Register, and keep the options of Megatron's parsed arguments for this process.

    For frameworks that parse Megatron's flags in one process and build optimizers in others from
    the arguments' names that Megatron's config knows, such as slime.

    Raises:
        ValueError: a value is not allowed.
        NotImplementedError: state cannot be stored as asked.
    """
    register()
    if args.optimizer == OPTIMIZER:
        unattached.keep(config_from_args(args))
