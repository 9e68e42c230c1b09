"""``--adam-mini-overlap-block-sums``: sums of squares are taken behind the backward pass.

Bit-equal to a run without, whatever changes gradients between their reduction and the step.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks
from tests.test_step import state_bits
from tests.training_run import OVERLAPPING_STAGES, Run, assert_same_state, make_dataset, train

OVERLAPPED = {"overlap_block_sums": True}
#: Two micro-batches, the last of which is reduced; several buckets where nothing stands against it.
JOB = Job(overlap=True, bucket_size=3000, steps=3)


def overlapped(job: Job) -> Job:
    return replace(job, adam_mini=job.adam_mini | OVERLAPPED)


def run(job: Job) -> tuple[list[Any], list[int]]:
    """Train; return norms and state after each step, and how many buckets were summed before it."""
    trainer = Trainer(job)
    bits, used = [], []
    for step in range(job.steps):
        _, norm, _ = trainer.step(step)
        trainer.sync_params()
        bits.append((norm, state_bits(trainer)))
        used.append(used_buckets(trainer))
    return bits, used


def used_buckets(trainer: Trainer) -> int:
    sums = trainer.optimizer.inner.overlapped_sums
    return 0 if sums is None else sums.used


CASES = {
    "tensor and pipeline parallelism, sequence parallel, tied": (
        replace(JOB, tp=2, pp=2, sequence_parallel=True, bias=True, tied=True, qk_layernorm=True),
        4,
    ),
    "experts, columns": (
        replace(JOB, experts=4, ep=2, adam_mini={"preset": "row-column"}),
        4,
    ),
    "several instances, frozen layers": (
        replace(JOB, instances=2, frozen=("decoder.layers.0",)),
        4,
    ),
    "virtual stages, bf16, remainders": (
        replace(
            JOB,
            layers=4,
            pp=2,
            vpp=2,
            bf16=True,
            grad_fp32=False,
            adam_mini={"param_remainders": True},
            optimizer_args={"loss_scale": 64.0},
        ),
        4,
    ),
}


@pytest.mark.support("block sums within the backward pass", "overlap")
@pytest.mark.parametrize("case", CASES)
def test_sums_behind_the_backward_pass_change_no_bit(case: str) -> None:
    job, world = CASES[case]
    plain = run_ranks(world, run, job)
    early = run_ranks(world, run, overlapped(job))
    for (bits, none), (other, used) in zip(plain, early, strict=True):
        assert bits == other
        assert none == [0] * job.steps
        assert min(used) > 0, "the step has taken all sums itself"


def test_the_flag_changes_no_bit_of_a_training_loop(tmp_path: Path) -> None:
    """Its schedule starts reductions itself, at the same time on all stages."""
    flags = f"{make_dataset(tmp_path / 'text')} {OVERLAPPING_STAGES}"
    plain = run_ranks(4, train, Run(flags))
    early = run_ranks(4, train, Run(f"{flags} --adam-mini-overlap-block-sums"))
    for one, other in zip(plain, early, strict=True):
        assert (one.error, other.error) == (None, None)
        assert_same_state(one.end, other.end)
        assert not [text for text in other.warnings if "overlap-block-sums" in text]


def interrupted(job: Job) -> tuple[list[Any], dict[str, int], list[str]]:
    """Do what callers may do between the backward pass and the step, one thing per iteration."""
    from torch import distributed

    trainer = Trainer(job)
    (chunk,), optimizer = trainer.chunks, trainer.optimizer.member
    grads = [param.main_grad for name, param in chunk.named_parameters() if "layers.1" in name]
    saved = optimizer.get_parameter_state_dp_zero()
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_adam_mini").addHandler(handler)

    def spoil() -> None:
        if distributed.get_rank() == 1:
            for grad in grads:
                grad.fill_(float("nan"))

    def change_data() -> None:
        for grad in grads:
            grad.data.mul_(0.5)

    changes: dict[str, Callable[[], object]] = {
        "first batch": lambda: None,
        "nothing": lambda: None,
        "scaled by Megatron": lambda: chunk.scale_gradients(0.5),
        "one row zeroed": lambda: grads[0][0].zero_(),
        "state loaded": lambda: optimizer.load_parameter_state_from_dp_zero(saved),
        "not finite on one rank": spoil,
        "backward pass repeated": lambda: trainer.backward(100),
        "norm asked for before": lambda: (optimizer.prepare_grads(), optimizer.get_grad_norm()),
        "changed through data": change_data,
        "afterwards": lambda: None,
    }
    bits, used = [], {}
    for step, (name, change) in enumerate(changes.items()):
        trainer.backward(step)
        change()
        updated, norm, _ = optimizer.step()
        trainer.sync_params()
        bits.append((name, updated, norm, state_bits(trainer)))
        used[name] = used_buckets(trainer)
    return bits, used, warnings


def test_the_step_takes_sums_again_where_gradients_have_changed() -> None:
    job = replace(JOB, bf16=True)
    plain = run_ranks(2, interrupted, job)
    early = run_ranks(2, interrupted, overlapped(job))
    for (bits, _, _), (other, used, warnings) in zip(plain, early, strict=True):
        assert bits == other
        buckets = used["nothing"]
        assert used == dict.fromkeys(used, 0) | dict.fromkeys(
            ("first batch", "nothing", "state loaded", "backward pass repeated"), buckets
        )
        assert buckets > 3
        assert [updated for _, updated, _, _ in bits].count(False) == 1
        changed, unseen = (text for text in warnings if "--adam-mini-overlap-block-sums" in text)
        assert "changed between their reduction and the step" in changed
        assert "is off from now on" in unseen


def late_stream(job: Job) -> tuple[list[Any], list[int], list[int]]:
    """Train with a stream of sums that works only when the step waits for it.

    Also returns how many buckets had been summed when the backward pass was over.
    """
    trainer = Trainer(job)
    (chunk,), sums = trainer.chunks, trainer.optimizer.inner.overlapped_sums
    queue: list[Callable[[], None]] = []
    taken = []

    class Kernels:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def call(*args: Any) -> None:
                assert torch.cuda.current_stream() is sums._stream
                queue.append(lambda: getattr(trainer.optimizer.inner.kernels, name)(*args))

            return call

    def wait_stream(stream: Any) -> None:
        if stream is sums._stream:
            while queue:
                queue.pop(0)()

    def look_and_finish(**kwargs: Any) -> None:
        taken.append(len(sums._taken))
        finish(**kwargs)

    sums._kernels = Kernels()
    torch.cuda.current_stream().wait_stream = wait_stream  # type: ignore[method-assign]
    finish, chunk.finish_grad_sync = chunk.finish_grad_sync, look_and_finish
    bits, used = [], []
    for step in range(job.steps):
        _, norm, _ = trainer.step(step)
        trainer.sync_params()
        bits.append((norm, state_bits(trainer)))
        used.append(used_buckets(trainer))
    return bits, used, taken


def test_the_step_waits_for_sums_that_hooks_have_started() -> None:
    ((plain, _),) = run_ranks(1, run, JOB)
    ((late, used, taken),) = run_ranks(1, late_stream, overlapped(JOB))
    assert late == plain
    # Megatron learns in the first iteration which gradients make a bucket complete.
    assert taken == [0, *used[1:]]
    assert min(used) > 3


def replaced(job: Job) -> tuple[list[int], bool]:
    """Build another optimizer for the same chunk, then drop both."""
    trainer = Trainer(job)
    (chunk,), first = trainer.chunks, trainer.optimizer
    trainer.optimizer = trainer._build_optimizer()
    trainer.step(0)
    used = [first.inner.overlapped_sums.used, used_buckets(trainer)]
    seen = weakref.ref(trainer.optimizer.inner.overlapped_sums)
    del first, trainer.optimizer
    gc.collect()
    start = chunk.bucket_groups[0].start_grad_sync
    assert start.original_of_adam_mini.__func__ is type(chunk.bucket_groups[0]).start_grad_sync
    chunk.start_grad_sync()
    chunk.finish_grad_sync()
    return used, seen() is None


def test_the_last_optimizer_of_a_chunk_takes_its_sums() -> None:
    ((used, gone),) = run_ranks(1, replaced, overlapped(JOB))
    assert used[0] == 0
    assert used[1] > 3
    assert gone


def refused(job: Job) -> None:
    Trainer(job)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"overlap": False}, "--overlap-grad-reduce"),
        ({"distributed_optimizer": False}, "--use-distributed-optimizer"),
        ({"config_args": {"calculate_per_token_loss": True}}, "--calculate-per-token-loss"),
        (
            {"ddp_args": {"reduce_scatter_with_fp32_accumulation": True}},
            "--ddp-reduce-scatter-with-fp32-accumulation",
        ),
        ({"adam_mini": {"single_phase": True}, "clip_grad": 0.0}, "--adam-mini-single-phase"),
    ],
)
def test_it_is_refused_where_it_is_of_no_use(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(1, refused, overlapped(replace(JOB, **change)))
    ((kind, text),) = caught.value.errors.values()
    assert kind == "ValueError"
    assert f"--adam-mini-overlap-block-sums is not possible: {reason}" in text.replace(
        "without ", ""
    )
    assert "Remedy:" in text
