"""Size, time and memory of checkpoints: Adam-mini beside Megatron's Adam on a Llama-shaped model.

    python -m benchmarks.checkpoint_size [--layers 12] [--hidden 768] [--tp 2] [--dp 2]

Saves are real, as in ``tests/test_checkpoint.py``: fully parallel, by Megatron's own writer.

* *Optimizer bytes*: all files of the checkpoint minus the bytes of the model's weights according to
  its metadata, so the containers around tensors, ``.metadata`` and the common state count too.
* *Seconds*: the whole save, building the state included, slowest rank; median (least, most).
* *Extra memory*: the peak of resident memory during the first save (``VmHWM``, reset before it)
  minus the resident memory before, on the rank where it is largest.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import heading, write
from megatron_adam_mini.checkpoint.reader import Checkpoint
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks
from tests.test_checkpoint import save

#: Title -> optimizer, Megatron's format, Adam-mini's.
FORMATS: dict[str, tuple[str, str, str | None]] = {
    "Megatron's Adam, `fully_reshardable`": ("adam", "fully_reshardable", None),
    "Megatron's Adam, `dp_reshardable`": ("adam", "dp_reshardable", None),
    "Adam-mini, `model_space`": ("adam_mini", "dp_reshardable", "model_space"),
    "Adam-mini, `buckets`": ("adam_mini", "dp_reshardable", "buckets"),
}
SHAPE = ("layers", "hidden", "heads", "groups", "ffn", "vocab", "tp")


# On the ranks.


def memory(field: str) -> int:
    """Return a field of this process's status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def save_and_measure(job: Job, folders: list[str], sharding: str) -> dict[str, Any]:
    """Train one step, save repeatedly, and return parameters, seconds and extra memory."""
    from torch import distributed

    trainer = Trainer(job)
    trainer.step(0)
    trainer.sync_params()
    extra, seconds = [], []
    for folder in folders:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        distributed.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the resident memory
        before = memory("VmRSS")
        begun = time.monotonic()
        save(trainer, folder, sharding)
        seconds.append(time.monotonic() - begun)
        extra.append(memory("VmHWM") - before)
        distributed.barrier()
    numel = sum(param.numel() for chunk in trainer.chunks for param in chunk.parameters())
    return {"seconds": seconds, "extra": extra, "numel": numel}


# In the parent process.


def sizes(folder: Path) -> tuple[int, int, int]:
    """Return the bytes of all files, those of the model's weights, and the number of weights."""
    checkpoint = Checkpoint(folder)
    total = sum(path.stat().st_size for path in folder.iterdir())
    stored = [t for key, t in checkpoint.tensors.items() if not key.startswith("optimizer.")]
    model = sum(chunk.length for tensor in stored for chunk in tensor.chunks)
    return total, model, sum(tensor.num_bytes // tensor.dtype.itemsize for tensor in stored)


def row(title: str, job: Job, world: int, sharding: str, saves: int) -> dict[str, Any]:
    """Measure one format."""
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root, str(number)) for number in range(saves)]
        for folder in folders:
            folder.mkdir()
        names = [str(folder) for folder in folders]
        ranks = run_ranks(world, save_and_measure, job, names, sharding, timeout=570)
        total, model, numel = sizes(folders[0])
    seconds = [max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    return {
        "title": title,
        "optimizer": total - model,
        "model": model,
        "numel": numel,
        "seconds": seconds,
        "extra": [rank["extra"][0] for rank in ranks],
    }


def line(found: dict[str, Any], reference: dict[str, Any]) -> str:
    """Return one row of the table."""
    saved = 1 - found["optimizer"] / reference["optimizer"]
    seconds = found["seconds"]
    times = f"{statistics.median(seconds):.1f} ({min(seconds):.1f}, {max(seconds):.1f})"
    return (
        f"| {found['title']} | {found['optimizer']:,} | {found['optimizer'] / found['numel']:.3f} "
        f"| {saved:.1%} | {times} | {max(found['extra']) / 2**20:,.0f} |"
    )


def main() -> None:
    """Measure, print, and write the dated result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {
        "layers": 12, "hidden": 768, "heads": 12, "groups": 4, "ffn": 2048, "vocab": 32000,
        "tp": 2, "dp": 2, "saves": 3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bucket-size", type=int, default=40_000_000, help="Megatron's default")
    parser.add_argument("--no-file", action="store_true", help="only print")
    args = parser.parse_args()
    found = []
    for title, (optimizer, sharding, own_format) in FORMATS.items():
        job = Job(
            optimizer=optimizer,
            adam_mini={"checkpoint_format": own_format} if own_format else {},
            bucket_size=args.bucket_size,
            **{key: vars(args)[key] for key in SHAPE},
            bf16=True,
            overlap=True,
            batch=2 * args.dp,
        )
        found.append(row(title, job, args.tp * args.dp, sharding, args.saves))
        print(found[-1], flush=True)
    text = heading("Size of checkpoints", "benchmarks.checkpoint_size")
    text += (
        f"\nModel: Llama shape, {found[0]['numel']:,} parameters ({args.layers} layers, hidden "
        f"{args.hidden}, {args.heads} heads, {args.groups} groups, feed-forward {args.ffn}, "
        f"vocabulary {args.vocab:,}, untied), bf16 with float32 main parameters; TP{args.tp} x "
        f"DP{args.dp}; {args.saves} saves each, one run. The model's weights take "
        f"{found[0]['model']:,} bytes more.\n\n"
        + __doc__.split("\n\n", 2)[2].replace("``", "`")
        + "\n| format | optimizer bytes | per parameter | less than the first | seconds | extra "
        "memory, MiB |\n|---|---|---|---|---|---|\n"
        + "\n".join(line(each, found[0]) for each in found)
        + "\n\nExtra memory by rank, MiB: "
        + "; ".join(
            f"{each['title']}: " + ", ".join(f"{extra / 2**20:,.0f}" for extra in each["extra"])
            for each in found
        )
        + ".\n"
    )
    print(text)
    if not args.no_file:
        print(f"written to {write('checkpoint-size', text)}")


if __name__ == "__main__":
    # The ranks import this module by its name; they could not find a function of ``__main__``.
    from benchmarks import checkpoint_size

    checkpoint_size.main()
