"""Run functions on the ranks of real gloo jobs, in processes that need not import anything.

Ranks are forked from a server that has torch and Megatron imported (see ``preload``), so every
call gets fresh processes and fresh process groups, and no test can leave something to the next:
a fork, the job's gloo group and the end of the process cost 20 ms a rank, so that ranks which are
kept from test to test would save little (all their groups would have to be torn down in between).

* ``run_ranks``: call a function on every rank, return what every rank returns;
* ``start_program``: let every rank run a program, as ``torchrun`` would, and kill it at will.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
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
        processes = [
            _start(_rank_main, _target(function), args, rank, world_size, folder, timeout)
            for rank in range(world_size)
        ]
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


class Program:
    """Ranks that run a program; as a context, it leaves none of them behind."""

    def __init__(self, processes: list[Any], log: Path, store: Any) -> None:
        self.processes = processes
        self.log = log
        self._store = store  # lives as long as the ranks look for each other there

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def output(self) -> str:
        """Return what all ranks have printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def poll(self) -> int | None:
        """Return the exit code of a rank that failed, 0 once all are done, else ``None``."""
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def wait_until(self, condition: Callable[[], Any], timeout: float) -> None:
        """Wait for a condition, at most as long as all ranks are running."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None, f"a rank ended\n{self.output()[-4000:]}"
            self._check(deadline)
            time.sleep(0.001)

    def wait(self, timeout: float) -> int:
        """Return ``poll()`` once it is a number; ranks that are left are killed then."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            self._check(deadline)
            time.sleep(0.01)
        self.kill()
        return code

    def _check(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            for process in self.processes:
                os.kill(process.pid, signal.SIGUSR1)  # prints where each thread is
                time.sleep(0.5)  # one after the other, or their lines would mix
            raise AssertionError(f"not finished in time\n{self.output()[-8000:]}")

    def family(self) -> set[int]:
        """Return the process ids of all ranks, and of the processes that these have started."""
        found: set[int] = set()
        waiting = [process.pid for process in self.processes]
        while waiting:
            pid = waiting.pop()
            found.add(pid)
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    waiting += map(int, (task / "children").read_text().split())
        return found

    def kill(self) -> None:
        """Kill all ranks at once, and what they have started."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


def start_program(
    world_size: int, function: Callable[..., Any], *args: Any, log: Path, folder: Path
) -> Program:
    """Let every rank call ``function(*args)``, which makes its process groups by itself.

    Args:
        world_size: number of ranks, all of them local.
        function: found again by its name, in ``folder``.
        args: what it is called with.
        log: file to which all ranks append their output.
        folder: working directory.
    """
    from torch import distributed

    # As torchrun does: the store lives outside of the ranks, on a port that nobody else has.
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    ranks = [
        environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)
    ]
    processes = [
        _start(_program_main, _target(function), args, rank, str(log), str(folder))
        for rank in ranks
    ]
    return Program(processes, log, store)


def _start(main: Callable[..., None], *args: Any) -> Any:
    process = _context.Process(target=main, args=args)
    process.start()
    return process


def _target(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _call(target: tuple[str, str], args: tuple[Any, ...]) -> Any:
    function: Any = importlib.import_module(target[0])
    for part in target[1].split("."):
        function = getattr(function, part)
    return function(*args)


def _write_output_to(path: Path) -> None:
    """Append what this process and its children print to a file, shown only when a rank fails."""
    output = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


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
    _write_output_to(Path(folder, f"{rank}.output"))
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
            # A rank that is done at once must not leave while others still connect to it.
            distributed.barrier()
            outcome = ("value", _call(target, args))
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


def _program_main(
    target: tuple[str, str],
    args: tuple[Any, ...],
    environment: dict[str, str],
    log: str,
    folder: str,
) -> None:
    _write_output_to(Path(log))
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(environment)
    os.chdir(folder)
    try:
        _call(target, args)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)
