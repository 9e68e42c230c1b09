"""A run through the real thing: ``megatron_adam_mini.launch``, Megatron, CPU host, one rank.

Imports ``settings`` and ``training``. Weights, batches, schedule and precision are those of
``training``, so that the losses are the same up to rounding.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from evidence.settings import SIZES, Run
from evidence.training import (
    BETA1,
    CLIP,
    EPS,
    POINTS,
    VALIDATION_SAMPLES,
    VALIDATIONS,
    WEIGHT_DECAY,
)

_ROOT = Path(__file__).resolve().parent.parent
_SCRIPT = Path(__file__).with_name("megatron_script.py")
_TRAINING = re.compile(r"\biteration\s+(\d+)/\s*\d+ .*?lm loss: (\S+)")
_VALIDATION = re.compile(r"validation loss at iteration (\d+) .*?lm loss value: (\S+)")


def flags(run: Run) -> list[str]:
    """Return the command line of the script, from ``--cpu-host`` on."""
    size = SIZES[run.size]
    values: dict[str, object] = {
        "settings": json.dumps(run.to_json()),
        "num-layers": size.layers,
        "hidden-size": size.hidden,
        "ffn-hidden-size": size.ffn,
        "num-attention-heads": size.heads,
        "num-query-groups": size.groups,
        "seq-length": size.sequence,
        "max-position-embeddings": size.sequence,
        "vocab-size": size.vocabulary,
        "make-vocab-size-divisible-by": 1,
        "tokenizer-type": "NullTokenizer",
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "micro-batch-size": size.batch,
        "global-batch-size": size.batch,
        "train-iters": run.steps,
        "lr": run.lr,
        "min-lr": 0,
        "lr-decay-style": "linear",
        "lr-warmup-iters": run.warmup,
        "adam-beta1": BETA1,
        "adam-beta2": run.beta2,
        "adam-eps": EPS,
        "weight-decay": WEIGHT_DECAY,
        "clip-grad": CLIP,
        "log-interval": _interval(run),
        "eval-iters": VALIDATION_SAMPLES // size.batch,
        "eval-interval": max(1, run.steps // VALIDATIONS),
        "optimizer": "adam" if run.optimizer == "adamw" else "adam_mini",
    }
    if run.optimizer != "adamw":
        values["adam-mini-preset"] = run.optimizer
    switches = (
        *("--use-distributed-optimizer", "--group-query-attention", "--swiglu"),
        *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
        "--no-create-attention-mask-in-dataloader",
    )
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["--cpu-host", str(_SCRIPT), *words, *switches]


def _interval(run: Run) -> int:
    return max(1, run.steps // POINTS)


def train(run: Run) -> dict[str, Any]:
    """Train one model by Megatron; see ``training.train``.

    Returns:
        ``validation``, ``training`` and ``seconds`` as there; ``training`` has a mean for each
        interval of Megatron's log.

    Raises:
        RuntimeError: the training failed; with the end of its output.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *launch, "-m", "megatron_adam_mini.launch", *flags(run)],
        cwd=_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"Megatron ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return parse(done.stdout, run) | {"seconds": round(time.perf_counter() - began, 1)}


def parse(output: str, run: Run) -> dict[str, Any]:
    """Return the losses in what Megatron wrote."""
    validation = {step: round(float(loss), 5) for step, loss in _VALIDATION.findall(output)}
    # Megatron also logs its first iteration, and counts it again in the interval that follows.
    losses = {int(step): float(loss) for step, loss in _TRAINING.findall(output)}
    interval = _interval(run)
    return {
        "validation": validation,
        "training": [round(loss, 4) for step, loss in losses.items() if step % interval == 0],
        "diverged": str(run.steps) not in validation,
    }
