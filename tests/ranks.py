"""Run a function on the ranks of a real gloo job, and collect what every rank returns.

Ranks are forked from a server that has torch and Megatron imported (see ``preload``), so every
call gets fresh processes and fresh process groups.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


class RankError(AssertionError):
    """At least one rank raised; ``errors`` maps ranks to their exceptions' type and text."""

    def __init__(self, errors: dict[int, tuple[str, str, str]]) -> None:
        self.errors = {rank: (kind, text) for rank, (kind, text, _) in errors.items()}
        super().__init__(
            "\n".join(f"--- rank {rank} ---\n{trace}" for rank, (_, _, trace) in errors.items())
        )


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call ``function(*args)`` on every rank of a new job; return its results by rank.

    Raises:
        RankError: a rank raised, died, or did not finish in time (all are killed then).
    """
    with tempfile.TemporaryDirectory() as folder:
        target = (function.__module__, function.__qualname__)
        processes = [
            _context.Process(
                target=_rank_main, args=(target, args, rank, world_size, folder, timeout)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        errors: dict[int, tuple[str, str, str]] = {}
        try:
            for rank, process in enumerate(processes):
                process.join(max(0.0, deadline - time.monotonic()))
                if process.exitcode is None:
                    log = Path(folder, f"{rank}.stacks")
                    stacks = log.read_text() if log.exists() else ""
                    errors[rank] = ("Timeout", f"not finished after {timeout} s", stacks)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        results = []
        for rank in range(world_size):
            path = Path(folder, f"{rank}.pickle")
            if not path.exists():
                code = processes[rank].exitcode
                output = Path(folder, f"{rank}.output")
                tail = output.read_text(errors="replace")[-4000:] if output.exists() else ""
                errors.setdefault(rank, ("Died", f"exit code {code}", f"exit code {code}\n{tail}"))
                continue
            kind, value = pickle.loads(path.read_bytes())
            if kind == "error":
                errors[rank] = value
            else:
                results.append(value)
        if errors:
            raise RankError(dict(sorted(errors.items())))
        return results


def _rank_main(
    target: tuple[str, str],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    # What Megatron prints on every rank is shown only when the rank fails.
    output = os.open(Path(folder, f"{rank}.output"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with open(Path(folder, f"{rank}.stacks"), "w") as log:
        faulthandler.dump_traceback_later(timeout * 0.9, file=log)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        try:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            function: Any = importlib.import_module(target[0])
            for part in target[1].split("."):
                function = getattr(function, part)
            outcome = ("value", function(*args))
        except BaseException as error:
            outcome = ("error", (type(error).__name__, str(error), traceback.format_exc()))
        partial = Path(folder, f"{rank}.partial")
        partial.write_bytes(pickle.dumps(outcome))
        partial.rename(Path(folder, f"{rank}.pickle"))
        faulthandler.cancel_dump_traceback_later()
        # Checkpoint writers leave processes of their own behind.
        for child in multiprocessing.active_children():
            child.kill()
    # Tearing gloo down one group at a time takes longer than the tests, and can wait for peers.
    os._exit(0)
