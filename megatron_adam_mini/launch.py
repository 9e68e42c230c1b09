"""Run an unmodified Megatron-LM training script with Adam-mini registered.

    torchrun --nproc-per-node 8 -m megatron_adam_mini.launch [--cpu-host] SCRIPT [ARGS...]

``SCRIPT`` is run as ``__main__`` with ``ARGS``, as ``python SCRIPT ARGS`` would do; options of the
launcher itself come before it.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import megatron_adam_mini


def main(arguments: Sequence[str] | None = None) -> None:
    """Register Adam-mini, then run the script that the arguments name.

    Args:
        arguments: command line without the program's name; default ``sys.argv[1:]``.

    Raises:
        SystemExit: the script does not exist, an option is unknown, or the CPU host refuses.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_adam_mini.launch",
        description="Run a Megatron-LM training script with --optimizer adam_mini available.",
        epilog="SCRIPT --help lists Megatron's flags and --adam-mini-*.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=megatron_adam_mini.__version__)
    parser.add_argument(
        "--cpu-host",
        action="store_true",
        help="run Megatron-Core on CPU cores with gloo, and add the flags that this needs",
    )
    parser.add_argument("script", metavar="SCRIPT", help="for example pretrain_gpt.py")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    script = Path(options.script)
    if not script.is_file():
        parser.error(f"script {options.script!r} does not exist; name a Megatron training script")

    # As with `python SCRIPT`: modules are found in its own folder first. If that is a checkout of
    # Megatron-LM, its Megatron-Core is what must be registered with, not an installed one.
    sys.path.insert(0, str(script.resolve().parent))
    script_arguments = list(options.args)
    if options.cpu_host:
        from megatron_adam_mini import cpu_host

        try:
            cpu_host.enable()
            script_arguments = cpu_host.with_cpu_flags(script_arguments)
        except (RuntimeError, ValueError) as error:
            parser.error(str(error))
    megatron_adam_mini.register()
    sys.argv = [str(script), *script_arguments]
    runpy.run_path(str(script), run_name="__main__")


# Spawned processes import the main module again: this one until the script runs, then the script,
# which needs such a guard too.
if __name__ == "__main__":
    main()
