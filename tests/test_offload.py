"""State in host memory: the same run bit for bit, wherever masters and moments lie.

On the CPU host both memories are the same, so what is compared is the division of the state, the
chunks and their copies. ``LateStream`` lets copies on other streams happen as late as they may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adam_mini.cpu_host import streams
from tests.gather import slices_of
from tests.megatron_job import Job, Trainer, global_names
from tests.ranks import run_ranks
from tests.test_checkpoint import (
    BASE,
    compare,
    compare_with_adam,
    load_and_show,
    train_adam_and_save,
    train_and_save,
)
from tests.test_oracle import check_replicas, check_same_gradients, sharded_run
from tests.test_step import digest
from tests.training_run import Run, Seen, assert_same_state, make_dataset, train

#: Elements of a chunk here: cuts rows, and each share into several chunks.
CHUNK = 500
#: Part of the state that is padding, at most, which the fraction does not count.
PADDING = 0.05
#: Megatron's flags of the same job with everything in host memory, copies beside the device's work.
HOST = {"optimizer_cpu_offload": True, "overlap_cpu_optimizer_d2h_h2d": True}
JOB = Job(
    tp=2, overlap=True, bucket_size=3000, steps=4, bf16=True, tied=True, bias=True, layers=1,
    hidden=32, heads=4, groups=2, ffn=48, vocab=64, batch=8,
)  # fmt: skip
SMALL = {"param_remainders": True, "exp_avg_dtype": "bf16", "stochastic_rounding": True}
FP16 = {"initial_loss_scale": 2.0**8, "hysteresis": 1, "loss_scale_window": 2}
EARLY = {"overlap_param_gather_with_optimizer_step": True}
JOBS = {
    "TP2 x DP2, cut blocks": (JOB, 4),
    "DP2, one bucket, float32": (
        replace(JOB, tp=1, overlap=False, bucket_size=None, bf16=False),
        2,
    ),
    "remainders, bf16 m, stochastic": (replace(JOB, adam_mini=SMALL), 4),
    "m in 8 bits, columns": (
        replace(JOB, tp=1, adam_mini={"exp_avg_dtype": "fp8", "preset": "row-column"}),
        2,
    ),
    "one second moment per element": (replace(JOB, tp=1, adam_mini={"preset": "first"}), 2),
    "fp16, skipped steps": (replace(JOB, tp=1, fp16=True, bf16=False, optimizer_args=FP16), 2),
    "bf16 gradients, float32 norms": (
        replace(JOB, tp=1, grad_fp32=False, float32_modules=("final_layernorm",)),
        2,
    ),
    "experts, EP2": (replace(JOB, tp=1, experts=4, ep=2), 2),
    "the first of two chunks gathered early": (
        replace(JOB, tp=1, pp=2, vpp=2, layers=4, optimizer_args=EARLY),
        4,
    ),
    "replicated state": (replace(JOB, distributed_optimizer=False, overlap=False), 2),
}


def offloaded(job: Job, fraction: float, **options: Any) -> Job:
    args = {**job.optimizer_args, **HOST, "optimizer_offload_fraction": fraction, **options}
    return replace(job, optimizer_args=args)


class LateStream(streams.Stream):
    """Does nothing until something waits for it, and then in order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Callable[[], Any]] = []

    def run(self) -> None:
        while self.queue:
            self.queue.pop(0)()

    def wait_stream(self, stream: streams.Stream) -> None:
        if isinstance(stream, LateStream):
            self.queue.append(stream.run)

    def wait_event(self, event: Any) -> None:
        self.queue.append(event.synchronize)


class LateEvent(streams.Event):
    """An event of late streams."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: Any = None

    def record(self, stream: Any = None) -> None:
        self.stream = stream or streams.current_stream()

    def synchronize(self) -> None:
        if isinstance(self.stream, LateStream):
            self.stream.run()


def be_late() -> None:
    """Let copies between host and device happen only once something waits for them."""
    from megatron_adam_mini import host_update

    def wait_for(stream: streams.Stream) -> None:
        if isinstance(stream, LateStream):
            stream.run()

    def copy_late(into: torch.Tensor, source: Any, non_blocking: bool = False) -> Any:
        stream = streams.current_stream()
        if non_blocking and isinstance(stream, LateStream):
            stream.queue.append(lambda: copy(into, source))
            return into
        return copy(into, source, non_blocking)

    copy = torch.Tensor.copy_
    torch.Tensor.copy_ = copy_late  # type: ignore[method-assign]
    host_update._stream, host_update._event = LateStream, LateEvent  # type: ignore[assignment]
    streams._default.wait_stream = wait_for  # type: ignore[method-assign]


def run(job: Job, late: bool = False, between: Callable[[Trainer], Any] | None = None) -> Any:
    """Train; the second step has a gradient that is not finite, the third one of 1e25."""
    from megatron_adam_mini import host_update

    host_update.CHUNK_NUMEL = CHUNK
    if late:
        be_late()
    trainer = Trainer(job)
    outcomes = []
    for step in range(job.steps):
        trainer.backward(step)
        inner = trainer.optimizer.inner
        if step in (1, 2) and torch.distributed.get_rank() == 0:
            inner.grad(inner.plan.pieces[0])[0] = float("inf") if step == 1 else 1e25
        outcomes.append(trainer.optimizer.step())
        if between is not None:
            between(trainer)
    trainer.sync_params()
    state = trainer.optimizer.inner.main_params.attach()
    return {
        "outcomes": outcomes,
        "losses": trainer.losses,
        "weights": digest(global_names(trainer.chunks).values()),
        "slices": slices_of(trainer),
        "bytes": trainer.optimizer.state_bytes(),
        "on host": sum(held.share.on_host for held in state.everywhere),
        "scale": float(trainer.optimizer.get_loss_scale()),
    }


def assert_same(plain: list[Any], other: list[Any]) -> None:
    for left, right in zip(plain, other, strict=True):
        for key in ("outcomes", "losses", "weights", "scale"):
            assert left[key] == right[key], key
        assert len(left["slices"]) == len(right["slices"])
        for one, two in zip(left["slices"], right["slices"], strict=True):
            assert (one.name, one.begin) == (two.name, two.begin)
            for key in ("param", "exp_avg", "v"):
                assert one.values[key].tobytes() == two.values[key].tobytes(), (one.name, key)


@pytest.mark.parametrize("case", JOBS)
def test_bits_are_those_of_a_run_without_offload(case: str) -> None:
    job, world = JOBS[case]
    plain = run_ranks(world, run, job)
    assert [updated for updated, *_ in plain[0]["outcomes"]][:2] == [True, False]
    assert plain[0]["on host"] == 0
    for fraction in (0.5, 1.0) if world > 2 else (0.5,):
        ranks = run_ranks(world, run, offloaded(job, fraction), True)
        assert_same(plain, ranks)
        for left, right in zip(plain, ranks, strict=True):
            assert right["on host"] >= 1
            sizes = [len(part.values["param"]) for part in left["slices"]]
            check_bytes(left["bytes"], right["bytes"], fraction, max(sizes) / sum(sizes))


def check_bytes(
    plain: dict[str, int], parts: dict[str, int], fraction: float, largest: float
) -> None:
    """No byte is on both sides, and what a fraction asks for is on the host."""
    for kind in ("main_param", "exp_avg", "exp_avg_sq"):
        assert parts[kind] + parts[f"host_{kind}"] == plain[kind]
    held = parts["host_exp_avg"] / plain["exp_avg"]
    # A piece more than asked for at most; padding is a part of neither share.
    assert fraction - PADDING <= held <= min(1.0, fraction + largest + PADDING)
    # Two places for the gradients and weights of a chunk, and the step sizes.
    assert 0 < parts["host_staging"] <= 2 * CHUNK * (4 + 4) + 4 * (1 + plain["exp_avg_sq"])


def test_copies_in_order_and_without_pinning_give_the_same_bits() -> None:
    plain = run_ranks(2, run, replace(JOB, tp=1))
    options = {
        "overlap_cpu_optimizer_d2h_h2d": False,
        "pin_cpu_grads": False,
        "pin_cpu_params": False,
    }
    assert_same(plain, run_ranks(2, run, offloaded(replace(JOB, tp=1), 0.5, **options)))


def test_nothing_is_offloaded_by_a_fraction_of_zero() -> None:
    ranks = run_ranks(1, run, offloaded(replace(JOB, tp=1, steps=1), 0.0))
    assert all(rank["on host"] == 0 for rank in ranks)
    others = {"launch_tables", "step_vectors"}
    assert ranks[0]["bytes"].keys() - others == {"main_param", "exp_avg", "exp_avg_sq"}


def away_and_back(trainer: Trainer) -> None:
    """Move the state as between rollout and training; what is on the host stays there."""
    state = trainer.optimizer.inner.main_params.attach()
    before = {number: held.exp_avg.data_ptr() for number, held in state.on_host.items()}
    del state
    trainer.optimizer.offload_to_cpu()
    trainer.optimizer.restore_from_cpu()
    state = trainer.optimizer.inner.main_params.attach()
    assert before == {number: held.exp_avg.data_ptr() for number, held in state.on_host.items()}


def phases(trainer: Trainer) -> None:
    """Take one step more, phase by phase."""
    trainer.backward(100)
    assert not trainer.optimizer.prepare_grads()
    trainer.optimizer.clip_grad_norm(0.5)
    assert trainer.optimizer.step_with_ready_grads()


@pytest.mark.parametrize("between", [away_and_back, phases])
def test_what_callers_do_between_steps(between: Any) -> None:
    job = replace(JOB, tp=1, steps=2)
    plain = run_ranks(2, run, job, False, between)
    assert_same(plain, run_ranks(2, run, offloaded(job, 0.6), True, between))


@pytest.mark.support("CPU offload", "oracle")
def test_an_offloaded_run_equals_the_oracle_on_its_own_gradients() -> None:
    job = offloaded(JOB, 0.5)
    ranks = run_ranks(4, sharded_run, job)
    check_replicas(ranks, job)
    check_same_gradients(ranks, job)


@pytest.mark.support("CPU offload", "overlap")
def test_overlap_of_megatrons_collectives_changes_no_bit() -> None:
    job = offloaded(replace(JOB, tp=1, bucket_size=None), 0.5)  # the same buckets for both
    assert_same(run_ranks(2, run, replace(job, overlap=False)), run_ranks(2, run, job, True))


@pytest.mark.support("CPU offload", "reshard")
@pytest.mark.parametrize("host_saves", [False, True])
def test_a_checkpoint_loads_with_and_without_offload(host_saves: bool, tmp_path: Path) -> None:
    """Under another layout, too."""
    job, other = replace(BASE, tp=2, layers=1), replace(BASE, layers=1)
    saves, loads = (offloaded(job, 0.4), other) if host_saves else (job, offloaded(other, 0.4))
    saved = run_ranks(2, train_and_save, saves, str(tmp_path))
    loaded = run_ranks(2, load_and_show, loads, str(tmp_path))
    compare(saved, saves, loaded, loads)


@pytest.mark.parametrize("host_saves", [False, True])
def test_flat_buckets_load_with_and_without_offload(host_saves: bool, tmp_path: Path) -> None:
    job = replace(BASE, layers=1, adam_mini={"checkpoint_format": "buckets", "preset": "first"})
    saves, loads = (offloaded(job, 0.4), job) if host_saves else (job, offloaded(job, 0.4))
    saved = run_ranks(2, train_and_save, saves, str(tmp_path))
    compare(saved, saves, run_ranks(2, load_and_show, loads, str(tmp_path)), loads)


@pytest.mark.support("CPU offload", "conversion")
def test_a_checkpoint_of_adam_is_taken_over(tmp_path: Path) -> None:
    adam_job = replace(BASE, layers=1, optimizer="adam")
    adam = run_ranks(2, train_adam_and_save, adam_job, str(tmp_path), "dp_reshardable")
    job = offloaded(replace(adam_job, optimizer="adam_mini", adam_mini={"preset": "first"}), 0.4)
    compare_with_adam(adam, adam_job, run_ranks(2, load_and_show, job, str(tmp_path)), job)


def gather_and_scatter(job: Job) -> None:
    """Move the state through the format ``torch``, in memory."""
    trainer = Trainer(job)
    trainer.step(0)
    member = trainer.optimizer.chained_optimizers[0]
    before = slices_of(trainer)
    kept = member.get_parameter_state_dp_zero(), member.state_dict()
    trainer.step(1)
    assert digest_of(before) != digest_of(slices_of(trainer))
    member.load_state_dict(kept[1])
    member.load_parameter_state_from_dp_zero(kept[0])
    assert digest_of(before) == digest_of(slices_of(trainer))


def digest_of(parts: list[Any]) -> str:
    return digest(
        torch.from_numpy(part.values[key]) for part in parts for key in ("param", "exp_avg", "v")
    )


def test_the_format_torch_holds_state_on_the_host() -> None:
    run_ranks(2, gather_and_scatter, offloaded(replace(JOB, tp=1), 0.5))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data") / "text")


OFFLOAD = "--optimizer-cpu-offload --optimizer-offload-fraction 0.5 --overlap-cpu-optimizer-d2h-h2d"


def test_flags_of_the_command_line(data: str, tmp_path: Path) -> None:
    """Megatron's loop: half a run with offload, the rest without, as one without."""
    straight: list[Seen] = run_ranks(2, train, Run(flags=data))
    flags = f"{data} --save {tmp_path} --exit-interval 4 {OFFLOAD} --no-pin-cpu-grads"
    first: list[Seen] = run_ranks(2, train, Run(flags=flags))
    rest: list[Seen] = run_ranks(2, train, Run(flags=f"{data} --load {tmp_path}"))
    for whole, half, other in zip(straight, first, rest, strict=True):
        assert [whole.error, half.error, other.error] == [None] * 3
        assert whole.steps == half.steps + other.steps
        assert_same_state(half.end, other.start)
        assert_same_state(whole.end, other.end)


def error_of(job: Job) -> tuple[str, str]:
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        Trainer(job)
    return type(caught.value).__name__, str(caught.value)


REFUSED = {
    "single phase": (
        replace(JOB, tp=1, clip_grad=0.0, adam_mini={"single_phase": True}),
        1.0,
        "the device takes the sums and the host updates. Remedy: drop one of them.",
    ),
    "too much": (replace(JOB, tp=1), 1.5, "--optimizer-offload-fraction 1.5 is not allowed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_all_ranks(case: str) -> None:
    job, fraction, text = REFUSED[case]
    for kind, message in run_ranks(2, error_of, offloaded(job, fraction)):
        assert kind == "ValueError"
        assert text in message
