"""One training by ``megatron.training`` in a process of its own, and what is measured inside of it.

``run`` starts this module with a training script's arguments, and returns losses, times and memory:
out of memory, or stopped at a time limit, a run spoils nothing that follows.

Fair to Adam: attention is torch's SDPA, and Megatron's fallback without Apex and Transformer
Engine, the unfused AdamW, is made the fused one.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_llama.py"
#: Layers, hidden size, FFN size, heads, query groups, sequence length, vocabulary.
MODELS = {
    "tiny": (2, 64, 96, 4, 2, 32, 257),
    "125m": (12, 768, 2048, 12, 4, 1024, 8192),
    "1.3b": (24, 2048, 5504, 16, 16, 2048, 32000),
}
OPTIMIZERS = {
    "adam": ["--optimizer", "adam"],
    "adam_mini": ["--optimizer", "adam_mini"],
    "adam_mini, small state": [
        "--optimizer", "adam_mini", "--adam-mini-param-remainders", "--exp-avg-dtype", "bf16",
    ],
}  # fmt: skip
_MARK = "MEASURED "
#: Steps whose times are not counted: allocation, compilation, algorithms of cuBLAS.
_WARM = 4


def flags(model: str, data: str, *, batch: int, micro_batch: int, steps: int) -> list[str]:
    """Return Megatron's flags of a model, of its data and of its training."""
    layers, hidden, ffn, heads, groups, sequence, vocabulary = MODELS[model]
    values: dict[str, Any] = {
        "num-layers": layers,
        "hidden-size": hidden,
        "ffn-hidden-size": ffn,
        "num-attention-heads": heads,
        "num-query-groups": groups,
        "seq-length": sequence,
        "max-position-embeddings": sequence,
        "vocab-size": vocabulary,
        "micro-batch-size": micro_batch,
        "global-batch-size": batch,
        "train-iters": steps,
        "lr": 3e-4,
        "min-lr": 3e-5,
        "lr-warmup-iters": 4,
        "lr-decay-style": "cosine",
        "clip-grad": 1.0,
        "weight-decay": 0.1,
        "adam-beta2": 0.95,
        "hidden-dropout": 0.0,
        "attention-dropout": 0.0,
        "log-interval": 1,
        "eval-iters": 0,
        "eval-interval": 10**6,
        "tokenizer-type": "NullTokenizer",
        "position-embedding-type": "rope",
        "normalization": "RMSNorm",
        "transformer-impl": "local",
        "num-workers": 0,
        "split": "100,0,0",
        "seed": 1234,
        "data-path": data,
        "data-cache-path": str(Path(data).parent / "cache"),
    }
    switches = (
        "swiglu", "disable-bias-linear", "untie-embeddings-and-output-weights", "bf16",
        "group-query-attention", "use-distributed-optimizer", "no-masked-softmax-fusion",
        "no-persist-layer-norm", "no-gradient-accumulation-fusion", "no-rope-fusion",
        "no-bias-swiglu-fusion", "no-bias-dropout-fusion",
        "no-create-attention-mask-in-dataloader",
    )  # fmt: skip
    found = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return found + [f"--{name}" for name in switches]


def make_dataset(folder: Path) -> str:
    """Tokenize the standard library's source; return the path of the data."""
    prefix = folder / "stdlib"
    command = [sys.executable, str(SCRIPT.with_name("tokenize_bytes.py"))]
    command += ["--output-prefix", str(prefix), "--max-bytes", "4000000"]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return str(prefix)


def run(arguments: Sequence[str], *, device: str, limit: float, log: Path) -> dict[str, Any]:
    """Train in a new process; return ``ok``, and what was measured or why it ended.

    Args:
        arguments: flags of the training script.
        device: ``cuda``, or ``cpu`` for the CPU host.
        limit: seconds after which the process is killed.
        log: where the output of all runs is kept.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.training", device, *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=_environment(), text=True, check=False, timeout=limit,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        text, status = done.stdout, str(done.returncode)
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode(errors="replace") if error.stdout else ""
        status = f"stopped after {limit:.0f} s"
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{text[-20000:]}\n")
    return {"status": status} | parse(text, status)


def parse(text: str, status: str) -> dict[str, Any]:
    """Read the log of a run."""
    times = [float(t) for t in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", text)]
    losses = [float(loss) for loss in re.findall(r"lm loss: ([\d.E+-]+)", text)]
    if len(losses) > 1:  # Megatron's second line is the mean of the first two steps
        losses[1] = round(2 * losses[1] - losses[0], 6)
    norms = [float(norm) for norm in re.findall(r"grad norm: ([\d.]+)", text)]
    found: dict[str, Any] = {"ok": status == "0" and bool(losses), "losses": losses}
    found["norms"] = norms
    found["iterations"] = len(times)
    if times:
        found["ms"] = statistics.median(times[_WARM:] or times)
    for line in text.splitlines():
        if line.startswith(_MARK):
            found |= json.loads(line.removeprefix(_MARK))
    if not found["ok"]:
        memory = "OutOfMemoryError" in text
        found["why"] = "out of memory" if memory else f"{status}: {text[-700:]}"
    return found


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    found = {
        "PYTHONPATH": path,
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29533",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "PYTHONUNBUFFERED": "1",
        # Compiling the few functions that Megatron marks takes longer than these short runs.
        "TORCHDYNAMO_DISABLE": "1",
    }
    return {**os.environ, **found}


# In the new process.


class Measured:
    """What is measured in a run: time of the optimizer, memory, saves and loads."""

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.steps: list[Any] = []
        self.values: dict[str, Any] = {}

    def optimizer(self, optimizer: Any) -> None:
        """Time ``step`` of an optimizer on the device."""
        import torch

        step = optimizer.step

        def timed() -> Any:
            if not self.on_gpu:
                return step()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            result = step()
            events[1].record()
            self.steps.append(events)
            return result

        optimizer.step = timed

    def memory(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that also measures how far memory rises above what is held."""
        import torch

        def measured(*args: Any, **kwargs: Any) -> Any:
            if not self.on_gpu:
                return call(*args, **kwargs)
            torch.cuda.synchronize()
            peak_before = torch.cuda.max_memory_allocated()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            result = call(*args, **kwargs)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            rise = self.values.get(f"{name}_rise_GB", 0.0)
            self.values[f"{name}_rise_GB"] = max(rise, (peak - held) / 1e9)
            self.values[f"{name}_held_GB"] = held / 1e9
            self.peak(peak_before)
            return result

        return measured

    def peak(self, allocated: int) -> None:
        """Take a peak of allocated bytes into account."""
        self.values["peak_GB"] = max(self.values.get("peak_GB", 0.0), allocated / 1e9)

    def finish(self) -> None:
        """Print everything on one line."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()
            self.peak(torch.cuda.max_memory_allocated())
            self.values["reserved_GB"] = torch.cuda.max_memory_reserved() / 1e9
            times = [begin.elapsed_time(end) for begin, end in self.steps]
            if times:
                self.values["optimizer_ms"] = statistics.median(times[_WARM:] or times)
        print(f"\n{_MARK}{json.dumps(self.values)}", flush=True)


def main() -> None:
    """Train as the example script does, measured."""
    device, *arguments = sys.argv[1:]
    if device == "cpu":
        from megatron_adam_mini import cpu_host

        cpu_host.enable()
        arguments = cpu_host.with_cpu_flags(arguments)
    import torch

    from megatron_adam_mini import launch

    if device == "cuda":
        torch.cuda.set_device(0)
        _on_gpu()
    measured = Measured(on_gpu=device == "cuda")
    from megatron.training import training

    setup = training.setup_model_and_optimizer

    def setup_and_measure(*args: Any, **kwargs: Any) -> Any:
        found = setup(*args, **kwargs)
        optimizer = found[1]
        for member in optimizer.chained_optimizers:
            if isinstance(member.optimizer, torch.optim.AdamW):
                for group in member.optimizer.param_groups:
                    group.update(foreach=False, fused=True)
            if hasattr(member, "state_bytes"):
                measured.values["state_bytes"] = member.state_bytes()
                measured.values["kernels"] = member.inner.kernels.NAME
        measured.optimizer(optimizer)
        return found

    training.setup_model_and_optimizer = setup_and_measure
    for name in ("save_checkpoint", "load_checkpoint"):
        setattr(training, name, measured.memory(name.split("_")[0], getattr(training, name)))
    try:
        launch.main([str(SCRIPT), *arguments])
    finally:
        measured.finish()


def _on_gpu() -> None:
    """Let Megatron-Core run from its wheel without Apex and Transformer Engine."""
    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    def attend(
        self: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, *_: Any, **__: Any
    ) -> Any:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return found.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    DotProductAttention.forward = attend


if __name__ == "__main__":
    main()
