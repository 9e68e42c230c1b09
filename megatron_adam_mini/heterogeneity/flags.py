"""Flags of ``megatron-adam-mini heterogeneity``, and what they choose.

Imports argparse, ``config`` and, once it has parsed, ``measurement``: a help text needs no torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_adam_mini.config import AdamMiniConfig

if TYPE_CHECKING:
    from megatron_adam_mini.heterogeneity.measurement import Options


def add_flags(parser: Any) -> None:
    """Add all flags but those of the partition."""
    parser.add_argument(
        "target",
        metavar="MODULE:FUNCTION",
        help="function without arguments that returns (module, loss, batches), with loss(module, "
        "batch) -> scalar; the current folder is searched for its module",
    )
    parser.add_argument("--steps", type=int, default=30, help="Lanczos steps (%(default)s)")
    parser.add_argument(
        "--probes", type=int, default=4, help="random vectors for each block (%(default)s), even"
    )
    parser.add_argument(
        "--parameters",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="only parameters whose names match",
    )
    parser.add_argument(
        "--vectors", action="store_true", help="also biases and norms, not matrices only"
    )
    parser.add_argument(
        "--blocks-per-parameter",
        type=int,
        default=4,
        metavar="N",
        help="of a parameter with more blocks, draw so many (%(default)s)",
    )
    parser.add_argument(
        "--floor",
        type=float,
        default=1e-6,
        help="eigenvalues so small beside the largest count as zero (%(default)s)",
    )
    parser.add_argument(
        "--width", type=float, default=0.5, help="smoothing, in decades (%(default)s)"
    )
    parser.add_argument("--num-heads", type=int, help="Query heads, for the preset 'paper'")
    parser.add_argument("--num-query-groups", type=int, help="Key heads, if fewer")
    parser.add_argument("--seed", type=int, default=0, help="of probes and drawn blocks")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw spectra as a PNG")
    parser.add_argument("--json", action="store_true", help="all spectra, as one JSON object")


def options_of(args: argparse.Namespace, config: AdamMiniConfig) -> Options:
    """Return what the flags choose.

    Raises:
        ValueError: a value is not allowed.
    """
    from megatron_adam_mini.heterogeneity.measurement import Options
    from megatron_adam_mini.standalone.blocks import Heads

    return Options(
        config=config,
        heads=Heads(args.num_heads, args.num_query_groups),
        patterns=tuple(args.parameters),
        vectors=args.vectors,
        blocks_per_parameter=args.blocks_per_parameter,
        steps=args.steps,
        probes=args.probes,
        floor=args.floor,
        width=args.width,
        seed=args.seed,
        dtype=args.dtype,
        device=args.device,
    )
