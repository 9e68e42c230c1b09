"""Runs of a plan -> lines of a log, by several processes of one thread each.

Imports torch, tqdm, ``settings``, ``grid``, ``run_log``, ``training`` and ``twin``.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch
from tqdm import tqdm

from evidence import training, twin
from evidence.grid import Plan, final_loss, pending
from evidence.run_log import RunLog
from evidence.settings import Run

_TRAINERS = {"torch": training.train, "megatron": twin.train}


def sweep(plan: Plan, log: RunLog, *, workers: int, minutes: float = float("inf")) -> bool:
    """Train all that is not in the log yet.

    Args:
        plan: what is asked.
        log: what is done; each run is appended when it ends.
        workers: processes, each of which uses one core.
        minutes: after them no run is begun.

    Returns:
        Whether all is done.
    """
    ends = time.monotonic() + 60 * minutes
    running: dict[Future[dict[str, Any]], Run] = {}
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool,
        tqdm(unit="run", dynamic_ncols=True) as bar,
    ):
        try:
            while True:
                todo = [run for run in pending(plan, log.results) if run not in running.values()]
                bar.total = bar.n + len(todo) + len(running)  # grows when rates are found
                if time.monotonic() < ends:
                    for run in todo[: workers - len(running)]:
                        running[pool.submit(_TRAINERS[run.trainer], run)] = run
                if not running:
                    return not todo
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    log.append(run, future.result())
                    bar.set_postfix_str(f"{run.describe()}: {final_loss(run, future.result()):.4f}")
                    bar.update()
        except BaseException:
            # The pool would wait for the runs that have begun.
            for process in multiprocessing.active_children():
                process.terminate()
            raise
