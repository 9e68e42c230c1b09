"""Flags that choose the partition into blocks: the same for a run, ``convert`` and ``memory``.

Imports argparse and ``config``. Data flow: command line -> **AdamMiniConfig**.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_adam_mini.config import PRESETS, RULES, AdamMiniConfig

#: Prefix of the flags where they stand next to Megatron's: in a run and in ``memory``.
RUN_PREFIX = "adam-mini-"


def add_partition_flags(group: Any, *, prefix: str = "") -> None:
    """Add the flags to a parser or to a group of it.

    Args:
        group: any object that has ``add_argument``.
        prefix: prefix of every flag's name, such as ``RUN_PREFIX``.
    """
    group.add_argument(
        f"--{prefix}preset",
        choices=PRESETS,
        default=AdamMiniConfig.preset,
        help="partition into blocks: 'paper' (head for Q and K, row elsewhere), 'row' (for Q "
        "and K, too), 'row-column' (columns for Value and the attention projection), 'slim' "
        "(columns for the MLP, too, full v for norms), 'first' (one block per tensor outside of "
        "attention, embedding and output elementwise), 'tensor'",
    )
    group.add_argument(
        f"--{prefix}value-as-block",
        action="store_true",
        help="Value of one layer is one block (advised by the authors for short runs)",
    )
    group.add_argument(
        f"--{prefix}full-v",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="keep one second moment per element for parameters whose global name matches",
    )
    group.add_argument(
        f"--{prefix}rules",
        metavar="FILE",
        help="JSON object {name pattern: row | column | head | tensor | element}; first match wins",
    )


def partition_config(args: argparse.Namespace, *, prefix: str = "") -> AdamMiniConfig:
    """Return the options that the flags select; all others have their defaults.

    Args:
        args: parsed arguments.
        prefix: as in :func:`add_partition_flags`.

    Raises:
        ValueError: the rules file cannot be read, or a rule is unknown.
    """

    def value(name: str) -> Any:
        return getattr(args, f"{prefix}{name}".replace("-", "_"))

    return AdamMiniConfig(
        preset=value("preset"),
        value_as_block=value("value-as-block"),
        full_v=tuple(value("full-v")),
        rules=read_rules(value("rules")) if value("rules") else (),
    )


def read_rules(path: str | Path) -> tuple[tuple[str, str], ...]:
    """Read ``{"pattern": "rule", ...}`` from a JSON file, keeping its order.

    Raises:
        ValueError: the file does not exist, is not a JSON object of strings, or is empty.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Adam-mini rules file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"Adam-mini rules file {str(path)!r} must hold a JSON object that maps name patterns "
            f"to one of {', '.join(RULES)}, and at least one of them."
        )
    return tuple((str(pattern), str(rule)) for pattern, rule in content.items())
