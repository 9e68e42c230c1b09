"""``megatron-adam-mini``: plan memory; look at checkpoints, check and convert them; Hessians.

Megatron for its estimate of activations only. Imports ``config``, ``partition_flags`` and, once a
command runs, ``convert``, ``estimate`` or ``heterogeneity``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_adam_mini import __version__
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.partition_flags import RUN_PREFIX, add_partition_flags, partition_config

_CODES = """exit codes:
  0  done, and nothing wrong was found
  1  the checkpoint is wrong: damaged, incomplete, or not what it says
  2  wrong usage, or something that cannot be read as a checkpoint
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; ``None``: those of the process.

    Returns:
        0: done; 1: the checkpoint is wrong; 2: wrong usage or unreadable input.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # --help and usage errors
        return int(stop.code or 0)
    from megatron_adam_mini.checkpoint.errors import CorruptError

    try:
        return int(args.run(args))
    except CorruptError as error:
        sys.stderr.write(f"megatron-adam-mini: {error}\n")
        return 1
    except (ValueError, OSError) as error:
        sys.stderr.write(f"megatron-adam-mini: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-adam-mini",
        description="Plan the memory of a run; look at, check and convert torch_dist "
        "checkpoints of Megatron; compare the Hessians of a model's blocks.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_verify(commands)
    _add_convert(commands)
    _add_memory(commands)
    _add_heterogeneity(commands)
    return parser


def _command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = _command(commands, "inspect", "say what is in a checkpoint", _inspect)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help=_CKPT)
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        "check that every element is stored once, undamaged and finite, and blocks as promised",
        _verify,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help=_CKPT)
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def _add_convert(commands: Any) -> None:
    parser = _command(commands, "convert", "make a checkpoint for another optimizer", _convert)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--to",
        choices=("adam-mini", "adam", "public"),
        help="'adam-mini': from Megatron's Adam; 'adam': from Adam-mini to Megatron's Adam; "
        "'public': from Adam-mini to a file for adam_mini.Adam_mini 1.1.1",
    )
    way.add_argument(
        "--from",
        dest="source_kind",
        choices=("public",),
        help="'public': from a file with the state of adam_mini.Adam_mini 1.1.1; needs --like",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help=_CKPT)
    parser.add_argument("destination", type=Path, metavar="DST", help="must not exist yet")
    parser.add_argument(
        "--like",
        type=Path,
        metavar="CKPT",
        help="for --from public: an Adam-mini checkpoint of the same model in Megatron (its first "
        "will do), which gives everything that the file does not hold",
    )
    group = parser.add_argument_group("partition, for --to adam-mini (as the flags of a run)")
    add_partition_flags(group)


def _add_memory(commands: Any) -> None:
    from megatron_adam_mini.estimate.flags import add_flags, add_search_flags

    text = "say what each rank will allocate for weights, gradients and optimizer state"
    parser = _command(commands, "memory", text, _memory)
    parser.add_argument("--json", action="store_true", help="all stages, as one JSON object")
    parser.add_argument(
        "--every-rank", action="store_true", help="with --json: bytes of each single rank, too"
    )
    add_flags(parser)
    group = parser.add_argument_group("partition (as the flags of a run)")
    add_partition_flags(group, prefix=RUN_PREFIX)
    add_search_flags(parser)


def _add_heterogeneity(commands: Any) -> None:
    from megatron_adam_mini.heterogeneity.flags import add_flags

    text = "say how much the Hessian spectra of a model's blocks differ"
    parser = _command(commands, "heterogeneity", text, _heterogeneity)
    add_flags(parser)
    group = parser.add_argument_group(
        "partition (as of a run, but one block per tensor unless --preset says otherwise)"
    )
    add_partition_flags(group)
    parser.set_defaults(preset="tensor")


_CKPT = "iteration folder (iter_0000010), or the folder of --save (its latest iteration)"


def _open(path: Path) -> Any:
    from megatron_adam_mini.checkpoint.reader import Checkpoint, iteration_folder

    return Checkpoint(iteration_folder(path)[0])


def _inspect(args: argparse.Namespace) -> int:
    from megatron_adam_mini.convert.inspection import as_text, inspect

    report = inspect(_open(args.checkpoint))
    _say(json.dumps(report, default=str) if args.json else as_text(report))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_adam_mini.convert.verification import verify

    checkpoint = _open(args.checkpoint)
    findings = verify(checkpoint)
    if args.json:
        _say(json.dumps({"checkpoint": str(checkpoint.folder), **findings.to_dict()}))
    else:
        counts = ", ".join(f"{count:,} {what}" for what, count in findings.checked.items())
        lines = [f"problem: {text}" for text in findings.problems]
        lines += [f"note: {text}" for text in findings.notes]
        verdict = f"{len(findings.problems)} problems" if findings.problems else "ok"
        _say("\n".join([*lines, f"{checkpoint.folder}: {verdict} ({counts})"]))
    return 1 if findings.problems else 0


def _convert(args: argparse.Namespace) -> int:
    from megatron_adam_mini.convert import conversions

    config = partition_config(args)
    if args.to != "adam-mini" and config != AdamMiniConfig():
        raise ValueError("--preset, --value-as-block, --full-v and --rules need --to adam-mini.")
    if (args.like is None) != (args.source_kind is None):
        raise ValueError("--from public needs --like CKPT, and nothing else takes it.")
    if args.to == "adam-mini":
        conversions.adam_to_adam_mini(args.source, args.destination, config)
    elif args.to == "adam":
        conversions.adam_mini_to_adam(args.source, args.destination)
    elif args.to == "public":
        conversions.adam_mini_to_public(args.source, args.destination)
    else:
        conversions.public_to_adam_mini(args.source, args.destination, args.like)
    return 0


def _memory(args: argparse.Namespace) -> int:
    from megatron_adam_mini.estimate.flags import (
        cluster_of,
        model_of,
        offload_fraction_of,
        parallel_of,
    )
    from megatron_adam_mini.estimate.report import in_words, memory_report

    if (cluster := cluster_of(args)) is not None:
        return _search(args, cluster)
    if args.every_rank and not args.json:
        raise ValueError("--every-rank is for programs to read; add --json.")
    options = partition_config(args, prefix=RUN_PREFIX)
    report = memory_report(
        model_of(args),
        parallel_of(args),
        options,
        offload_fraction=offload_fraction_of(args),
        every_rank=args.every_rank,
    )
    _say(json.dumps(report) if args.json else in_words(report))
    return 0


def _search(args: argparse.Namespace, cluster: Any) -> int:
    from megatron_adam_mini.estimate.flags import fixed_sizes, model_of, offload_fraction_of
    from megatron_adam_mini.estimate.plot import draw
    from megatron_adam_mini.estimate.search import search
    from megatron_adam_mini.estimate.search_report import search_in_words, search_report
    from megatron_adam_mini.mcore.activations import activation_estimate

    if args.every_rank:
        raise ValueError("--every-rank is for one layout; leave --gpu-memory or it out.")
    try:
        activations = activation_estimate()
    except ImportError:
        activations = None
    model = model_of(args)
    found = search(
        model,
        cluster,
        partition_config(args, prefix=RUN_PREFIX),
        fixed=fixed_sizes(args),
        offload_fraction=offload_fraction_of(args),
        activations=activations,
    )
    report = search_report(model, cluster, found)
    if args.plot is not None:
        draw(report, args.plot)
    _say(json.dumps(report) if args.json else search_in_words(report))
    return 0


def _heterogeneity(args: argparse.Namespace) -> int:
    from megatron_adam_mini.heterogeneity.flags import options_of
    from megatron_adam_mini.heterogeneity.measurement import measure
    from megatron_adam_mini.heterogeneity.plot import draw
    from megatron_adam_mini.heterogeneity.report import in_words, report_of
    from megatron_adam_mini.heterogeneity.target import load

    options = options_of(args, partition_config(args))
    measured = measure(*load(args.target), options, progress=sys.stderr.isatty())
    if args.plot is not None:
        draw(measured, args.plot, args.target)
    report = report_of(measured)
    _say(json.dumps(report) if args.json else in_words(report))
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
