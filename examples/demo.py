"""Train small Llamas with Adam and with Adam-mini on this machine's CPU, and compare.

``make demo`` runs it; two cores take less than five minutes. Each step is a command that it prints
and that also works by hand:

1. tokenise the Python standard library for Megatron;
2. and 3. train under TP2 x PP2 x DP2 with ``--optimizer adam`` and ``--optimizer adam_mini``, all
   other flags the same, and measure the optimizer's state and its communication;
4. train a model that is small enough for three seeds each by AdamW and by the stand-alone
   ``AdamMini``, both at the best rate that ``make evidence`` found, and compare their losses.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from evidence.comparison import Comparison

EXAMPLES = Path(__file__).resolve().parent
NUM_RANKS = 8

MODEL_FLAGS = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --seq-length 128 --max-position-embeddings 128
    --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 1
"""
LAYOUT_FLAGS = """
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --bf16
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
"""
TRAINING_FLAGS = """
    --micro-batch-size 4 --global-batch-size 16 --lr 1e-3 --min-lr 0 --lr-decay-style linear
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 0.1 --clip-grad 1.0 --split
    95,5,0 --no-create-attention-mask-in-dataloader --eval-iters 8 --eval-interval 1000000 --seed
    1234 --log-interval 2
"""

_ITERATION = re.compile(r"\biteration\s+(\d+)/\s*\d+ .*?lm loss: (\S+)")
_VALIDATION = re.compile(
    r"validation loss at iteration \d+ on validation set \| lm loss value: (\S+)"
)
#: The progress of ``python -m evidence``.
_SEED = re.compile(r"(\S+) lr \S+ steps \d+ seed (\d+): ([\d.]+)")


class RunError(Exception):
    """A command ended with an error; the message contains the relevant part of its output."""


@dataclass
class Run:
    """Result of one training run."""

    title: str
    iterations: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation_loss: float = float("nan")
    report: dict[str, Any] = field(default_factory=dict)


def run_command(
    command: Sequence[str], log: Path, on_line: Any = None, timeout_s: float = 600.0
) -> None:
    """Run ``command``, write its output to ``log`` and pass each line to ``on_line`` at once.

    However this call ends (error, interrupt, time limit), no process of the command is left.

    Raises:
        RunError: if the command fails, or does not finish within ``timeout_s`` seconds.
    """
    print("  $ " + shlex.join(command), flush=True)
    # One thread per rank: there are more ranks than cores.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(EXAMPLES.parent), os.environ.get("PYTHONPATH")))
        ),
    }
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # a Ctrl-C reaches this process only, which then ends the command
    )
    timed_out = threading.Event()

    def end() -> None:
        timed_out.set()
        _end(process)

    timer = threading.Timer(timeout_s, end)
    timer.start()
    try:
        assert process.stdout is not None
        with log.open("w", encoding="utf-8") as log_file:
            for line in process.stdout:
                log_file.write(line)
                if on_line is not None:
                    on_line(line)
        return_code = process.wait()
    finally:
        timer.cancel()
        _end(process)
    if timed_out.is_set() or return_code != 0:
        reason = (
            f"was not done after {timeout_s:.0f} s"
            if timed_out.is_set()
            else f"failed with exit code {return_code}"
        )
        raise RunError(f"the command above {reason}; from its output ({log}):\n\n{_excerpt(log)}")


def _excerpt(log: Path, num_lines: int = 40) -> str:
    """Return the lines from the first error on: later errors are those of the other ranks."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    first = next((i for i, line in enumerate(lines) if "Traceback (most recent" in line), None)
    start = max(0, len(lines) - num_lines) if first is None else first
    return "\n".join(lines[start : start + num_lines])


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    # Not SIGKILL first: torchrun gives every rank its own session, and only torchrun can end all of
    # them.
    process.terminate()
    try:
        process.wait(timeout=45)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def train(title: str, optimizer: str, num_iterations: int, dataset: Path, output: Path) -> Run:
    """Train with one optimizer and return Megatron's logged numbers and the measured state."""
    run = Run(title)
    report = output / f"{optimizer}-state.json"
    report.unlink(missing_ok=True)
    started = time.monotonic()

    def on_line(line: str) -> None:
        if match := _ITERATION.search(line):
            run.iterations.append(int(match[1]))
            run.losses.append(float(match[2]))
            if run.iterations[-1] % 10 == 0 or run.iterations[-1] == 1:
                print(
                    f"  {title:<9}  iteration {run.iterations[-1]:>4}/{num_iterations}"
                    f"  loss {run.losses[-1]:.3f}  ({time.monotonic() - started:.0f} s)",
                    flush=True,
                )
        elif match := _VALIDATION.search(line):
            run.validation_loss = float(match[1])

    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(NUM_RANKS),
    ]
    run_command(
        [
            *launch,
            *("-m", "megatron_adam_mini.launch", "--cpu-host", str(EXAMPLES / "pretrain_llama.py")),
            *("--optimizer", optimizer),
            *(("--adam-mini-preset", "row") if optimizer == "adam_mini" else ()),
            *shlex.split(MODEL_FLAGS),
            *shlex.split(LAYOUT_FLAGS),
            *shlex.split(TRAINING_FLAGS),
            *(
                "--train-iters",
                str(num_iterations),
                "--lr-warmup-iters",
                str(max(1, num_iterations // 20)),
            ),
            *("--data-path", str(dataset), "--data-cache-path", str(output / "cache")),
            *("--state-report", str(report)),
        ],
        output / f"{optimizer}.log",
        on_line,
    )
    if (
        not run.losses
        or run.iterations[-1] != num_iterations
        or run.validation_loss != run.validation_loss
    ):
        raise RunError(
            f"{output / f'{optimizer}.log'} lacks the losses that Megatron logs at the end of a run"
        )
    run.report = json.loads(report.read_text(encoding="utf-8"))
    return run


def compare(output: Path) -> list[Comparison]:
    """Train with several seeds, and return the losses of both optimizers."""
    sys.path.insert(0, str(EXAMPLES.parent))
    # Imported here, because it takes seconds: a wrong argument is reported before.
    from evidence.comparison import tuned
    from evidence.grid import PLANS
    from evidence.run_log import read
    from evidence.settings import label

    log = output / "comparison.jsonl"
    log.unlink(missing_ok=True)
    shown = set()

    def on_line(line: str) -> None:
        if (match := _SEED.search(line)) and match[0] not in shown:
            shown.add(match[0])
            print(
                f"  {label(match[1]):<15} seed {match[2]}: validation loss {match[3]}", flush=True
            )

    run_command(
        [sys.executable, "-m", "evidence", "--plan", "demo", "--log", str(log)],
        output / "comparison.log",
        on_line,
    )
    plan = PLANS["demo"]
    return tuned(plan, plan.settings[0], read(log))


def print_state(adam: Run, adam_mini: Run) -> None:
    """Print bytes of state and added communication of both runs side by side."""

    def kilobytes(run: Run, *kinds: str) -> str:
        return f"{sum(run.report['state_bytes'].get(kind, 0) for kind in kinds) / 1e3:,.1f} kB"

    def added(run: Run, key: str) -> str:
        return f"{run.report['communication'][key]:,}"

    runs = (adam, adam_mini)
    state = {"m": ("exp_avg",), "v": ("exp_avg_sq",), "m + v": ("exp_avg", "exp_avg_sq")}
    _print_table(
        [
            ("", *(run.title for run in runs)),
            *(
                (f"optimizer state, all ranks: {name}", *(kilobytes(run, *kinds) for run in runs))
                for name, kinds in state.items()
            ),
            ("float32 main parameters, all ranks", *(kilobytes(r, "main_param") for r in runs)),
            ("added collectives per step", *(added(run, "collectives_per_step") for run in runs)),
            ("added bytes per step and rank", *(added(run, "bytes_per_step") for run in runs)),
        ]
    )


def print_losses(compared: Sequence[Comparison]) -> None:
    """Print the losses of both optimizers over the seeds, and their gap."""
    from evidence.settings import label

    _print_table(
        [
            ("", *(label(entry.optimizer) for entry in compared)),
            ("learning rate", *(f"{entry.lr:g}" for entry in compared)),
            ("validation loss, mean of the seeds", *(f"{entry.mean:.3f}" for entry in compared)),
            ("standard deviation of the seeds", *(f"{entry.spread:.3f}" for entry in compared)),
            ("numbers in v", *(f"{entry.second_moments:,}" for entry in compared)),
        ]
    )
    gap = compared[-1].gap
    assert gap is not None
    print(
        f"\n  Adam-mini minus AdamW, seed by seed: {gap.mean:+.3f}, 95 % interval "
        f"{gap.mean - gap.half_width:+.3f} to {gap.mean + gap.half_width:+.3f}"
    )


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    print()
    for index, (text, *values) in enumerate(rows):
        print(f"  {text:<36}" + "".join(f"{value:>18}" for value in values))
        if index == 0:
            print("  " + "-" * (36 + 18 * len(values)))


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=100,
        help="training steps on several ranks (default %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/demo"),
        help="folder of results (default %(default)s)",
    )
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    dataset = output / "stdlib"
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        print("1/4  Tokenising the Python standard library into Megatron's indexed format")
        tokenize = [
            sys.executable,
            str(EXAMPLES / "tokenize_bytes.py"),
            "--output-prefix",
            str(dataset),
        ]
        run_command(tokenize, output / "tokenize.log", timeout_s=120)
        print(f"\n2/4  Training with Adam on {NUM_RANKS} ranks")
        adam = train("Adam", "adam", arguments.iterations, dataset, output)
        print(f"\n3/4  Training with Adam-mini on {NUM_RANKS} ranks")
        adam_mini = train("Adam-mini", "adam_mini", arguments.iterations, dataset, output)
        print_state(adam, adam_mini)
        print("\n  These runs have one seed: they show state, not which loss is lower.")
        print("\n4/4  Comparing losses: three seeds each, both at their best rate")
        compared = compare(output)
    except RunError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    print_losses(compared)
    print(
        f"\n  losses: {output / 'comparison-curves.png'}    logs: {output}"
        f"    total: {time.monotonic() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
