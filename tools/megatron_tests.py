"""Run Megatron-LM's own unit tests with Adam and with Adam-mini, and print where they differ.

    python tools/megatron_tests.py --megatron CHECKOUT [--json FILE] [--adam FILE] [TESTS...]

CHECKOUT is Megatron-LM at the tag of the installed megatron-core (0.19.2: core_v0.19.0). Only its
tests are used; the code under test is the installed package, on the CPU host (see
``megatron_host.py`` for what is replaced). TESTS are files, folders or node ids below
``tests/unit_tests``. For maintainers, not part of ``make test``.

The process that collects a file forks fresh ranks for every test, so that no test sees what another
one left. The outcome is the worst of all ranks, its error the one that came first in time.

For Adam-mini, ``get_megatron_optimizer`` changes ``config.optimizer`` from "adam" to "adam_mini"
before it reads the config, as a user would. Optimizers that a test makes in another way stay as
they are; the last line says how many tests got Adam-mini.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = (
    "dist_checkpointing/test_optimizer.py",
    "test_optimizer.py",
    "test_optimizer_param_scheduler.py",
    "test_checkpointing.py",
    "distributed",
    "training/test_param_norm.py",
)
OPTIMIZERS = ("adam", "adam_mini")
OUTCOMES = ("passed", "skipped", "failed", "hung")
GRACE = 5.0  # seconds for the other ranks to report, once one has failed


class RankPlugin:
    """pytest plugin that runs every test on ranks of its own; ``results`` are by node id."""

    def __init__(self, world_size: int, timeout: float, progress: Any) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self._world_size = world_size
        self._timeout = timeout
        self._progress = progress
        self._result_file = Path()  # of a rank

    def pytest_collectreport(self, report: Any) -> None:
        """Record a file that cannot be imported as one failed test."""
        if not report.passed:
            self._record(report.nodeid, _result_of(report), 0.0)

    def pytest_runtest_protocol(self, item: Any) -> bool:
        """Run one test, in place of pytest."""
        start = time.monotonic()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            results = self._run_ranks(item, Path(folder))
        worst = max(results, key=lambda r: (OUTCOMES.index(r["outcome"]), -r["time"]))
        self._record(item.nodeid, worst, time.monotonic() - start)
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write a rank's result: of the first phase that did not pass, or of the last."""
        if not self._result_file.exists() and (not report.passed or report.when == "teardown"):
            partial = self._result_file.with_suffix(".partial")
            partial.write_text(json.dumps(_result_of(report)))
            partial.rename(self._result_file)

    def _record(self, nodeid: str, result: dict[str, Any], seconds: float) -> None:
        self.results[nodeid] = result
        print(f"{result['outcome']:<8}{seconds:6.1f} s  {nodeid}", file=self._progress, flush=True)

    def _run_ranks(self, item: Any, folder: Path) -> list[dict[str, Any]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        pids = {rank: self._fork(item, rank, folder) for rank in range(self._world_size)}
        deadline = time.monotonic() + self._timeout
        results: dict[int, dict[str, Any]] = {}
        while len(results) < len(pids) and time.monotonic() < deadline:
            time.sleep(0.01)
            for rank in pids.keys() - results.keys():
                end = os.waitid(os.P_PID, pids[rank], os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if (file := folder / f"{rank}.json").exists():
                    results[rank] = json.loads(file.read_text())
                elif end is not None:
                    results[rank] = _result("failed", f"rank {rank} died, status {end.si_status}")
                else:
                    continue
                if results[rank]["outcome"] == "failed":
                    deadline = min(deadline, time.monotonic() + GRACE)
        missing = sorted(pids.keys() - results.keys())
        failed = [result for result in results.values() if result["outcome"] == "failed"]
        if missing and not failed:
            os.kill(pids[missing[0]], signal.SIGUSR1)  # writes where it is
            time.sleep(0.5)
            stack = (folder / f"{missing[0]}.stack").read_text()
            innermost = stack.partition("File ")[2].partition("\n")[0]
            error = f"ranks {missing} did not finish; rank {missing[0]} is in {innermost}"
            results[missing[0]] = _result("hung", error, stack)
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return failed or list(results.values())

    def _fork(self, item: Any, rank: int, folder: Path) -> int:
        """Start a rank. It waits after the test, since its end would disturb the others."""
        pid = os.fork()
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # whichever of the two comes first
        if pid:
            return pid
        try:
            stack = (folder / f"{rank}.stack").open("w")
            faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
            self._result_file = folder / f"{rank}.json"
            # Shared by the ranks; pytest numbers their own folders in it.
            os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.tempdir = str(folder)
            import megatron_host
            from _pytest.runner import runtestprotocol

            megatron_host.become_rank(rank)
            runtestprotocol(item, nextitem=None)
            while True:
                signal.pause()
        finally:
            os._exit(1)


def _result(outcome: str, error: str = "", trace: str = "") -> dict[str, Any]:
    """Return what is kept of a test; ``error`` is one line, ``time`` tells whose was first."""
    import megatron_host

    line = next((line.strip() for line in error.splitlines() if line.strip()), "")
    result = {"outcome": outcome, "error": line, "trace": trace, "time": time.monotonic()}
    return result | {"adam_mini": megatron_host.num_replaced}


def _result_of(report: Any) -> dict[str, Any]:
    reason = report.longrepr or ""
    if isinstance(reason, tuple):  # of a skip
        return _result(report.outcome, str(reason[2]))
    crash = getattr(reason, "reprcrash", None)
    error = crash.message if crash else str(reason).rpartition("\nE ")[2]
    return _result(report.outcome, error, str(reason))


def _run_file(test: str, optimizer: str, options: argparse.Namespace, output: Path) -> None:
    """Run the tests of one file, in a process of its own; write their results to ``output``."""
    import megatron_host
    import pytest

    megatron_host.end_with_parent()
    progress = os.fdopen(os.dup(2), "w")
    with open(options.log, "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = ["pytest"]
    if optimizer == "adam_mini":
        megatron_host.put_adam_mini_in_adams_place()
    plugin = RankPlugin(options.ranks, options.timeout, progress)
    ini = ["-c", str(options.megatron / "pyproject.toml"), "-o", "addopts=", "--capture=no"]
    pytest.main([*ini, "--import-mode=append", "-p", "no:cacheprovider", test], plugins=[plugin])
    output.write_text(json.dumps(plugin.results))


def _print_differences(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    first, second = (results[optimizer] for optimizer in OPTIMIZERS)
    missing = {"outcome": "missing", "error": ""}
    for nodeid in first | second:
        pair = [first.get(nodeid, missing), second.get(nodeid, missing)]
        if pair[0]["outcome"] != pair[1]["outcome"]:
            print(nodeid)
            for optimizer, result in zip(OPTIMIZERS, pair, strict=True):
                print(f"    {optimizer:<10}{result['outcome']:<8}{result['error']}")
    for optimizer, tests in results.items():
        counts = Counter(result["outcome"] for result in tests.values())
        totals = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
        print(f"{optimizer:<10}{len(tests)} tests: {totals}")
    replaced = sum(result["adam_mini"] > 0 for result in second.values())
    print(f"{replaced} of the tests got Adam-mini in Adam's place")


def _files(folder: Path, names: list[str]) -> list[str]:
    tests: list[str] = []
    for name in names:
        path = folder / name.partition("::")[0]
        if not path.exists():
            raise SystemExit(f"{path} does not exist")
        tests += map(str, sorted(path.rglob("test_*.py")) if path.is_dir() else [folder / name])
    return tests


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megatron", type=Path, required=True, help="checkout of Megatron-LM")
    parser.add_argument("--json", type=Path, help="write all outcomes, with their tracebacks")
    parser.add_argument("--adam", type=Path, help="take Adam's outcomes from an earlier --json")
    parser.add_argument("--log", type=Path, default=os.devnull, help="append what tests print")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one test")
    parser.add_argument("tests", nargs="*", default=TESTS, help="below tests/unit_tests")
    options = parser.parse_args()
    for name in ("megatron", "json", "adam", "log"):  # the working folder will be another one
        setattr(options, name, (path := getattr(options, name)) and path.resolve())
    tests = _files(options.megatron / "tests/unit_tests", options.tests)
    import megatron_host

    megatron_host.prepare(options.megatron, options.ranks)
    results: dict[str, dict[str, dict[str, Any]]] = {optimizer: {} for optimizer in OPTIMIZERS}
    known = json.loads(options.adam.read_text())["adam"] if options.adam else {}
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        for test in tests:
            for optimizer in OPTIMIZERS[1:] if options.adam else OPTIMIZERS:
                print(f"{optimizer}: {test}", file=sys.stderr, flush=True)
                output = Path(folder, "results.json")
                arguments = (test, optimizer, options, output)
                process = context.Process(target=_run_file, args=arguments)
                process.start()
                process.join()
                if not output.exists():
                    error = f"the process of the file ended with {process.exitcode}"
                    output.write_text(json.dumps({test: _result("failed", error)}))
                results[optimizer] |= json.loads(output.read_text())
                output.unlink()
            results["adam"] |= {name: known[name] for name in results["adam_mini"] if name in known}
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    _print_differences(results)


if __name__ == "__main__":
    main()
