"""Megatron-Core with Adam-mini on one GPU: a step by Triton against the same step by plain torch.

    torchrun --nproc-per-node 1 -m benchmarks.gpu.ranks                     # NCCL
    torchrun --nproc-per-node 2 -m benchmarks.gpu.ranks --backend gloo      # ranks share the GPU

For each job: real forward and backward passes in Megatron's DDP, one optimizer step by Triton, and
the same from the same state and gradients by the reference. m, main parameters, v, weights and the
norm must agree but for the order of additions, replicas and the norms of all ranks bit by bit.

gloo takes CUDA tensors in most collectives, but not in coalesced ones, which are issued one by one
here, nor in send and receive, so there are no pipelines. ``--device cpu`` tries it on the CPU host.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed

from benchmarks.gpu import measure

#: Block sums differ by the order of additions, so v by 3e-6 and steps by half of that.
FLOAT32 = {"rtol": 2e-5, "atol": 1e-7}
#: Next to a rounding boundary, 16-bit values differ by one unit in the last place.
SIXTEEN_BITS = {"rtol": 2e-2, "atol": 1e-6}
NORM_RTOL = 1e-5


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of jobs")
    return parser.parse_args()


@contextlib.contextmanager
def one_by_one(*_: Any, **__: Any) -> Iterator[Any]:
    """Stand in for torch's coalescing manager."""

    class Done:
        def wait(self) -> None: ...

    yield Done()


def jobs(world_size: int, *, overlap: bool) -> dict[str, Any]:
    """Return the jobs by name."""
    from tests.megatron_job import Job

    base = Job(steps=3, bf16=True, batch=16)
    small = {"param_remainders": True, "exp_avg_dtype": "bf16"}
    half = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
    beside = half | {"overlap_cpu_optimizer_d2h_h2d": True}
    found = {
        "bf16": base,
        "remainders, bf16 m": replace(base, adam_mini=small),
        "remainders, bf16 m, stochastic": replace(
            base, adam_mini={**small, "stochastic_rounding": True}
        ),
        "bf16 gradients": replace(base, grad_fp32=False),
        "fp16": replace(base, bf16=False, fp16=True, optimizer_args={"initial_loss_scale": 256.0}),
        "float32": replace(base, bf16=False),
        "without distributed optimizer": replace(base, distributed_optimizer=False),
        "one v per element somewhere": replace(base, adam_mini={"preset": "first"}),
        "value as block": replace(base, adam_mini={"value_as_block": True}),
        "single phase": replace(base, clip_grad=0.0, adam_mini={"single_phase": True}),
        "small buckets": replace(base, bucket_size=2000),
        "half of the state on the host, one stream": replace(base, optimizer_args=half),
        "half of the state on the host": replace(base, optimizer_args=beside),
        "the same, remainders, bf16 m": replace(base, optimizer_args=beside, adam_mini=small),
    }
    if overlap:
        found["overlap"] = replace(base, overlap=True, bucket_size=2000)
    if world_size % 2 == 0:
        found |= {
            "TP 2": replace(base, tp=2),
            "TP 2, sequence parallel": replace(base, tp=2, sequence_parallel=True),
        }
    return found


def trainer_of(job: Any, device: torch.device) -> Any:
    """Build model and optimizer on the device; data are made on the CPU."""
    from tests.megatron_job import Trainer

    class OnDevice(Trainer):
        def _build_chunk(self, vp_stage: int | None) -> Any:
            chunk = super()._build_chunk(vp_stage)
            return chunk if device.type == "cpu" else chunk.cuda()

        def batch_of(self, step: int) -> Tensor:
            with torch.device("cpu"):
                return super().batch_of(step).to(device)

        def backward(self, step: int) -> None:
            with torch.device(device):
                super().backward(step)

    return OnDevice(job)


def live_tensors(inner: Any) -> list[Tensor]:
    """Return state and weights, which a step changes in place."""
    weights = [buffer.weight.detach() for buffer in inner.buffers]
    return [*inner.main_params.attach().flat_tensors(), *weights]


def compare_step(trainer: Any, step: int) -> float:
    """Compare one step; return the milliseconds of the one by fast kernels."""
    from megatron_adam_mini.kernels import reference

    member = trainer.optimizer.chained_optimizers[0]
    inner = member.inner
    trainer.backward(step)
    before = [tensor.clone() for tensor in live_tensors(inner)]
    scaler = member.grad_scaler
    scaler_state = scaler.state_dict() if scaler is not None else None
    started = time.perf_counter()
    result = trainer.optimizer.step()
    took = 1e3 * (time.perf_counter() - started)
    found = [tensor.clone() for tensor in live_tensors(inner)]
    for tensor, kept in zip(live_tensors(inner), before, strict=True):
        tensor.copy_(kept)
    if result[0]:
        inner.main_params.step_count -= 1
    if scaler is not None:
        scaler.load_state_dict(scaler_state)
    fast, inner.kernels = inner.kernels, reference
    try:
        expected = trainer.optimizer.step()
    finally:
        inner.kernels = fast
    assert result[0], f"Triton skipped the step: {result}"
    assert expected[0], f"the reference skipped the step: {expected}"
    tensors = live_tensors(inner)
    assert any(not torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    for number, (tensor, value) in enumerate(zip(tensors, found, strict=True)):
        if tensor.dtype == torch.int16:
            continue  # remainders of weights next to a rounding boundary differ by their range
        close = FLOAT32 if tensor.dtype == torch.float32 else SIXTEEN_BITS
        torch.testing.assert_close(value, tensor, **close, msg=lambda m, n=number: f"{n}: {m}")
    if result[1] is not None:
        difference = abs(result[1] - expected[1])
        assert difference <= NORM_RTOL * expected[1], (result, expected)
        norms: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(norms, result[1])
        assert len(set(norms)) == 1, norms
    return took


def assert_replicas_equal(trainer: Any) -> None:
    """Check that data-parallel ranks have the same weights."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    for param in trainer.optimizer.chained_optimizers[0].model_params:
        low, high = param.detach().float().clone(), param.detach().float().clone()
        distributed.all_reduce(low, op=distributed.ReduceOp.MIN, group=group)
        distributed.all_reduce(high, op=distributed.ReduceOp.MAX, group=group)
        assert torch.equal(low, high), "replicas differ"


def _mark_norms() -> None:
    """Let torch's norms stand in for Transformer Engine's in sequence-parallel layers."""
    from megatron.core.transformer import torch_norm

    from megatron_adam_mini.cpu_host.megatron_imports import mark_torch_norms_as_sequence_parallel

    mark_torch_norms_as_sequence_parallel(torch_norm)


def main() -> int:
    """Run the jobs on this rank, and return the exit status."""
    options = parse()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = measure.device(options.device)
    if device.type == "cpu":
        from megatron_adam_mini import cpu_host

        cpu_host.enable()
    distributed.init_process_group(options.backend)
    from megatron.core import parallel_state
    from megatron.core.distributed import param_and_grad_buffer

    from megatron_adam_mini import host_update

    host_update.CHUNK_NUMEL = 4096  # several chunks of these models
    if device.type == "cuda":
        _mark_norms()
    overlap = options.backend == "nccl" or device.type == "cpu"
    if not overlap:
        param_and_grad_buffer._coalescing_manager = one_by_one
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    name = f"ranks_{options.backend}_{world_size}"
    record = measure.Record(
        name if rank == 0 else f"{name}.{rank}", device, echo=rank == 0, ranks=world_size
    )
    for title, job in jobs(world_size, overlap=overlap).items():
        if not title.startswith(tuple(options.only)):
            continue
        with record.guard(title):
            trainer = trainer_of(job, device)
            kernels = trainer.optimizer.chained_optimizers[0].inner.kernels.NAME
            assert kernels == ("triton" if device.type == "cuda" else "cpu"), kernels
            times = [compare_step(trainer, step) for step in range(options.steps)]
            trainer.sync_params()
            assert_replicas_equal(trainer)
            record.add(job=title, steps=len(times), loss=trainer.losses[-1], step_ms=times[-1])
        parallel_state.destroy_model_parallel()
    # The other ranks' failures count, too, and their files are not kept.
    counts: list[Any] = [None] * world_size
    distributed.all_gather_object(counts, record.values["failures"])
    if rank:
        record.remove()
    else:
        for other, failures in enumerate(counts[1:], 1):
            for text in failures:
                record.fail(f"rank {other}: {text}")
    status = record.close() if rank == 0 else 0
    sys.stdout.flush()
    os._exit(status)  # groups were destroyed; NCCL would only wait for them


if __name__ == "__main__":
    main()
