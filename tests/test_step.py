"""One step against Megatron's own: norm, clipping, loss scale, skipped steps, determinism."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.gather import slices_of, whole_tensors
from tests.megatron_job import Job, Trainer, global_names
from tests.ranks import run_ranks

# Both sides add the same float32 gradients in another order.
NORM_TOLERANCE = 2e-6
# Clipping folded into the update, or a rounding of every gradient: a few float32 roundings (6e-8)
# in each of three steps, amplified by what the changed weights do to the next gradients.
CLIP_TOLERANCE = 1e-5
# The block sums of scaled gradients are rounded anew, so v and with it the step differ by 6e-8.
SCALE_TOLERANCE = 1e-5

SHARDED = Job(tp=2, pp=2, overlap=True, bucket_size=3000, steps=3)


def digest(tensors: Any) -> str:
    """Return a hash of the bits of some tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def state_bits(trainer: Trainer) -> str:
    """Return a hash of everything that a step may change on this rank."""
    inner = trainer.optimizer.inner
    tensors = inner.main_params.attach().flat_tensors()
    tensors += list(global_names(trainer.chunks).values())
    return digest(tensors) + f" step {inner.main_params.step_count}"


def first_norm(job: Job) -> tuple[Any, Any]:
    trainer = Trainer(job)
    _, norm, zeros = trainer.step(0)
    return float(norm), zeros


NORM_LAYOUTS = {
    "tp2-pp2-dp2": (SHARDED, 8),
    "tied": (replace(SHARDED, tied=True, tp=1), 4),
    "sequence parallel, biases": (replace(SHARDED, pp=1, sequence_parallel=True, bias=True), 4),
    "replicated state": (replace(SHARDED, pp=1, distributed_optimizer=False), 4),
    "several instances": (replace(SHARDED, pp=1, instances=2), 8),
    "bf16": (replace(SHARDED, bf16=True), 8),
    "bf16 gradients": (replace(SHARDED, bf16=True, grad_fp32=False, pp=1), 4),
    "fp16 gradients": (
        replace(SHARDED, fp16=True, grad_fp32=False, pp=1, optimizer_args={"loss_scale": 64.0}),
        4,
    ),
}


@pytest.mark.support("gradient norm, zeros, skipped steps as Megatron's Adam", "test")
@pytest.mark.parametrize("case", NORM_LAYOUTS)
def test_grad_norm_and_zeros_equal_megatrons_own(case: str) -> None:
    job, world = NORM_LAYOUTS[case]
    job = replace(job, optimizer_args=job.optimizer_args | {"log_num_zeros_in_grad": True})
    ours = run_ranks(world, first_norm, job)
    stock = run_ranks(world, first_norm, replace(job, optimizer="adam"))
    assert len(set(ours)) == 1, "ranks disagree on the norm"
    assert ours[0][0] == pytest.approx(stock[0][0], rel=NORM_TOLERANCE)
    assert ours[0][1] == stock[0][1]
    # Tokens that a batch lacks have zero gradients, unless the output layer shares their rows.
    assert (ours[0][1] > 0) == (not job.tied)


def clipped_steps(job: Job) -> Any:
    """Train with gradients that Megatron's own functions clip first, or that ours clips."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    trainer = Trainer(replace(job, clip_grad=0.0 if job.optimizer_args else job.clip_grad))
    stock = trainer.optimizer.config.grad_norm_skip_threshold == 1e9
    norms = []
    for step in range(job.steps):
        trainer.backward(step)
        if stock:
            trainer.optimizer.prepare_grads()
            norm = trainer.optimizer.get_grad_norm()
            proxies = []
            for piece in trainer.optimizer.inner.plan.pieces:
                grad = trainer.optimizer.inner.grad(piece)
                proxy = torch.nn.Parameter(torch.empty_like(grad))
                proxy.grad = grad
                proxies.append(proxy)
            clip_grad_by_total_norm_fp32(proxies, job.clip_grad, norm)
            trainer.optimizer.step()
        else:
            norm = trainer.optimizer.step()[1]
        norms.append(norm)
    return norms, slices_of(trainer)


def test_folded_clipping_equals_megatrons_clipping_of_the_buffer() -> None:
    job = replace(SHARDED, pp=1, clip_grad=0.1)
    ours = run_ranks(4, clipped_steps, job)
    stock = run_ranks(
        4, clipped_steps, replace(job, optimizer_args={"grad_norm_skip_threshold": 1e9})
    )
    assert ours[0][0][0] > 0.1, "nothing was clipped"
    np.testing.assert_allclose(ours[0][0], stock[0][0], rtol=CLIP_TOLERANCE)
    for key in ("param", "exp_avg", "v"):
        mine = whole_tensors([r[1] for r in ours], key, job)
        theirs = whole_tensors([r[1] for r in stock], key, job)
        for name, value in mine.items():
            scale = float(theirs[name].abs().max())
            assert float((value - theirs[name]).abs().max()) <= CLIP_TOLERANCE * scale, (
                f"{key} {name}"
            )


def poisoned_run(job: Job, value: float) -> list[Any]:
    """Put a non-finite value into one rank's gradients in steps 1 and 2 of 4."""
    from torch import distributed

    trainer = Trainer(job)
    ours = job.optimizer == "adam_mini"
    record = []
    for step in range(4):
        trainer.backward(step)
        if step in (1, 2) and distributed.get_rank() == distributed.get_world_size() - 1:
            bucket = trainer.chunks[0].buffers[0].buckets[-1]
            # In the last slice's parameters, not in the padding after them.
            bucket.params_list[0].main_grad.view(-1)[-1:].fill_(value)
            bucket.grad_data[bucket.grad_data.numel() // 2 :][:1].fill_(value)
            bucket.grad_data[:1].fill_(value)
        before = state_bits(trainer) if ours else ""
        updated, norm, zeros = trainer.optimizer.step()
        record.append((updated, norm is None, float(trainer.optimizer.get_loss_scale())))
        if ours and step in (1, 2):
            assert not updated
            assert (norm, zeros) == (None, None)
            assert state_bits(trainer) == before, "a skipped step changed state"
        elif ours:
            assert state_bits(trainer) != before
    return record


@pytest.mark.support("gradient norm, zeros, skipped steps as Megatron's Adam", "test")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["fp16, dynamic loss scale", "bf16, constant loss scale"])
def test_non_finite_gradients_skip_the_step_as_megatrons_adam_does(kind: str, value: float) -> None:
    if kind.startswith("fp16"):
        options = {"initial_loss_scale": 1024.0, "hysteresis": 1, "loss_scale_window": 1}
        job = Job(tp=2, fp16=True, optimizer_args=options)
    else:
        job = Job(tp=2, bf16=True, optimizer_args={"loss_scale": 64.0})
    ours = run_ranks(4, poisoned_run, job, value)
    stock = run_ranks(4, poisoned_run, replace(job, optimizer="adam"), value)
    assert ours == stock
    assert [entry[0] for entry in ours[0]] == [True, False, False, True]


def test_without_a_loss_scale_a_non_finite_step_is_skipped_too() -> None:
    record = run_ranks(4, poisoned_run, Job(tp=2), float("nan"))
    assert [entry[0] for entry in record[0]] == [True, False, False, True]


def test_norm_above_the_skip_threshold_skips_the_step() -> None:
    record = run_ranks(1, threshold_run, Job(optimizer_args={"grad_norm_skip_threshold": 1e-3}))
    assert record[0] == (False, True, True)


def threshold_run(job: Job) -> tuple[bool, bool, bool]:
    trainer = Trainer(job)
    trainer.backward(0)
    before = state_bits(trainer)
    updated, norm, _ = trainer.optimizer.step()
    return updated, norm > 1e-3, state_bits(trainer) == before


def scaled_run(job: Job) -> Any:
    trainer = Trainer(job)
    norms = [trainer.step(step)[1] for step in range(job.steps)]
    return norms, slices_of(trainer)


def test_loss_scale_changes_nothing() -> None:
    job = replace(SHARDED, bf16=True, pp=1)
    plain = run_ranks(4, scaled_run, job)
    scaled = run_ranks(4, scaled_run, replace(job, optimizer_args={"loss_scale": 4096.0}))
    # A power of two scales every float exactly, so only sums of squares are rounded anew.
    np.testing.assert_allclose(plain[0][0], scaled[0][0], rtol=NORM_TOLERANCE)
    for key in ("param", "exp_avg", "v"):
        mine = whole_tensors([r[1] for r in plain], key, job)
        other = whole_tensors([r[1] for r in scaled], key, job)
        for name, value in mine.items():
            np.testing.assert_allclose(
                value, other[name], rtol=SCALE_TOLERANCE, atol=1e-9, err_msg=name
            )


def bits_per_step(job: Job) -> list[str]:
    trainer = Trainer(job)
    bits = []
    for step in range(4):
        trainer.step(step)
        trainer.sync_params()
        bits.append(state_bits(trainer))
    return bits


OVERLAPS = {
    "tp2-pp2-dp2": (Job(tp=2, pp=2), 8),
    "bf16, tp2-pp2-dp2": (Job(tp=2, pp=2, bf16=True), 8),
    "cp2-dp2": (Job(cp=2), 4),
    "virtual stages": (Job(layers=4, pp=2, vpp=2), 4),
    "several instances": (Job(instances=2), 4),
    "replicated state": (Job(distributed_optimizer=False), 2),
}


@pytest.mark.support(
    {
        "tp2-*": "tensor parallelism",
        "*-pp2-*": "pipeline parallelism",
        "tp2-pp2-dp2": "data parallelism, distributed optimizer",
        "replicated state": "data parallelism, replicated state",
        "cp2*": "context parallelism",
        "virtual stages": "virtual pipeline stages",
        "several instances": "several distributed-optimizer instances",
        "tp2-pp2*": "float32",
        "bf16*": "bf16 with float32 main parameters",
    },
    "overlap",
)
@pytest.mark.parametrize("case", OVERLAPS)
def test_overlap_on_equals_overlap_off_bit_for_bit(case: str) -> None:
    job, world = OVERLAPS[case]
    assert run_ranks(world, bits_per_step, job) == run_ranks(
        world, bits_per_step, replace(job, overlap=True)
    )


def test_two_identical_runs_are_bit_equal() -> None:
    job = replace(SHARDED, pp=1, groups=1, tp=4, bf16=True)
    first, second = (run_ranks(8, bits_per_step, job) for _ in range(2))
    assert first == second
    assert len(set(first[0])) == 4, "the state did not move"


def replica_bits(job: Job) -> list[dict[str, str]]:
    """Return, for each step, the bits of every parameter of which other ranks hold a copy."""
    from megatron.core import parallel_state

    trainer = Trainer(job)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    bits = []
    for step in range(job.steps):
        trainer.step(step)
        trainer.sync_params()
        found = {}
        for name, param in global_names(trainer.chunks).items():
            if name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            split = getattr(param, "tensor_model_parallel", False)
            found[f"{name} of tensor-parallel rank {tp_rank}" if split else name] = digest([param])
        bits.append(found)
    return bits


def test_replicas_and_tied_embeddings_are_bit_equal_after_each_step() -> None:
    job = replace(SHARDED, tied=True, steps=12, bf16=True, qk_layernorm=True, bucket_size=1)
    ranks = run_ranks(8, replica_bits, job)
    for step in range(job.steps):
        seen: dict[str, str] = {}
        copies = 0
        for rank in ranks:
            for name, bits in rank[step].items():
                copies += name in seen
                assert seen.setdefault(name, bits) == bits, f"step {step}: {name} differs"
        assert copies > 20


def counted_step(job: Job) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """Count the collectives that an optimizer step really makes, parameter gathers aside."""
    from torch import distributed

    trainer = Trainer(job)
    trainer.step(0)
    trainer.backward(1)
    calls: list[tuple[str, int]] = []

    def counting(name: str, original: Any, position: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args[position].nbytes))
            return original(*args, **kwargs)

        return call

    originals = {}
    for name in dir(distributed):
        if name.startswith(("all_", "broadcast", "reduce", "gather", "scatter", "send", "recv")):
            originals[name] = getattr(distributed, name)
            if callable(originals[name]):
                setattr(distributed, name, counting(name, originals[name], 0))
    trainer.optimizer.inner.sum_squares()
    for name, original in originals.items():
        setattr(distributed, name, original)
    return calls, trainer.optimizer.communication_per_step()


@pytest.mark.parametrize(
    ("job", "world", "collectives"),
    [
        (Job(overlap=True, bucket_size=3000), 1, 0),
        (Job(overlap=True, bucket_size=3000), 3, 1),
        (Job(tp=2), 2, 1),
        (Job(tp=2, overlap=True, bucket_size=3000), 6, 2),
        (Job(tp=4, groups=1, pp=2, overlap=True, bucket_size=3000), 8, 1),
        (Job(adam_mini={"full_v": ["*"]}, tp=2), 4, 0),
    ],
)
def test_collectives_are_those_that_are_reported(job: Job, world: int, collectives: int) -> None:
    for calls, reported in run_ranks(world, counted_step, job):
        assert calls[-1] == ("all_reduce", 16), "the norm comes last: two float64"
        assert len(calls) - 1 == reported["collectives"] == collectives
        assert sum(size for _, size in calls[:-1]) == reported["bytes"]


def test_a_stage_without_trainable_parameters_takes_part() -> None:
    job = Job(pp=2, steps=2, frozen=("decoder.layers.1", "decoder.final", "output_layer"))
    (first, trainable), (second, frozen) = run_ranks(2, frozen_run, job)
    assert first == second
    assert first[0] > 0
    assert (trainable > 0, frozen) == (True, 0)


def frozen_run(job: Job) -> tuple[list[float], int]:
    trainer = Trainer(job)
    norms = [trainer.step(step)[1] for step in range(job.steps)]
    return norms, len(trainer.optimizer.get_parameters())


def phases(trainer: Trainer, clip_grad: float) -> tuple[bool, float | None, None]:
    """Take a step in the phases of Megatron's own MixedPrecisionOptimizer.step."""
    optimizer = trainer.optimizer
    if optimizer.prepare_grads():
        return False, None, None
    norm = optimizer.clip_grad_norm(clip_grad) if clip_grad > 0.0 else optimizer.get_grad_norm()
    return optimizer.step_with_ready_grads(), norm, None


def halved_steps(job: Job, by_caller: bool) -> list[str]:
    """Halve gradients in the buffers, or on the main shards as callers of Megatron's do."""
    trainer = Trainer(job)
    optimizer, record = trainer.optimizer, []
    for step in range(3):
        trainer.backward(step)
        if not by_caller:
            for buffer in optimizer.inner.buffers:
                buffer.grad.mul_(0.5)
        assert not optimizer.prepare_grads()
        if by_caller:
            for shard in optimizer.get_parameters():
                shard.grad.mul_(0.5)
        assert optimizer.step_with_ready_grads()
        trainer.sync_params()
        record.append(state_bits(trainer))
        optimizer.zero_grad()
        assert all(shard.grad is None for shard in optimizer.get_parameters())
    return record


@pytest.mark.parametrize(
    "job",
    [
        Job(),
        Job(bf16=True, bucket_size=3000, overlap=True),
        Job(bf16=True, grad_fp32=False),
        Job(fp16=True, optimizer_args={"initial_loss_scale": 2.0**10}),
        Job(bf16=True, distributed_optimizer=False),
    ],
    ids=["float32", "bf16", "bf16 gradients", "fp16", "replicated"],
)
def test_gradients_of_main_shards_are_those_of_the_step(job: Job) -> None:
    by_caller = run_ranks(2, halved_steps, job, True)
    assert by_caller == run_ranks(2, halved_steps, job, False)
    assert len({*by_caller[0]}) == 3


def driven_run(job: Job, by_phases: bool) -> list[Any]:
    """Train by step() or by its phases; gradients of one rank are not finite in step 2."""
    from torch import distributed

    trainer = Trainer(job)
    record = []
    for step in range(5):
        trainer.backward(step)
        if step == 2 and distributed.get_rank() == 1:
            trainer.optimizer.inner.grad(trainer.optimizer.inner.plan.pieces[0])[0] = float("inf")
        outcome = phases(trainer, job.clip_grad) if by_phases else trainer.optimizer.step()
        trainer.sync_params()
        scale = float(trainer.optimizer.get_loss_scale())
        record.append((outcome, scale, state_bits(trainer)))
    return record


@pytest.mark.parametrize("clip_grad", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["float32", "bf16, remainders", "fp16, growing loss scale"])
def test_phase_by_phase_equals_one_step_bit_for_bit(kind: str, clip_grad: float) -> None:
    job = Job(tp=2, overlap=True, bucket_size=3000, clip_grad=clip_grad)
    if kind.startswith("bf16"):
        job = replace(job, bf16=True, adam_mini={"param_remainders": True})
    elif kind.startswith("fp16"):
        # The scale grows after each good step, between taking the sums and using them.
        options = {"initial_loss_scale": 1024.0, "hysteresis": 1, "loss_scale_window": 1}
        job = replace(job, fp16=True, optimizer_args=options)
    at_once, by_phases = (run_ranks(4, driven_run, job, driven) for driven in (False, True))
    assert at_once == by_phases
    for rank in at_once:
        assert [outcome[0] for outcome, _, _ in rank] == [True, True, False, True, True]
        assert len({bits for _, _, bits in rank}) == 4, "only the skipped step leaves the state"
        norms = [outcome[1] for outcome, _, _ in rank if outcome[0]]
        assert min(norms) > 0.1, "nothing would be clipped"


def refused_calls(job: Job) -> list[str]:
    """Call what torch's optimizers and Megatron's offer, and Adam-mini does not."""
    optimizer = Trainer(job).optimizer
    calls = [
        lambda: optimizer.optimizer.add_param_group({"params": [torch.zeros(1)]}),
        optimizer.optimizer.step,
        lambda: optimizer.load_parameter_state("distrib_optim.pt", update_legacy_format=True),
    ]
    found = []
    for call in calls:
        with pytest.raises(NotImplementedError) as caught:
            call()
        found.append(str(caught.value))
    return found


def test_what_is_not_offered_is_refused_with_the_remedy() -> None:
    (found,) = run_ranks(1, refused_calls, Job())
    assert "build the optimizer again" in found[0]
    assert "get_megatron_optimizer" in found[1]
    assert "--optimizer adam first" in found[2]


def reloaded(job: Job) -> list[bool]:
    """Change the weights behind the optimizer's back, tell it, and compare its main parameters."""
    trainer = Trainer(job)
    trainer.step(0)
    trainer.sync_params()
    for param in trainer.optimizer.member.model_params:
        param.data.mul_(2)
    inner = trainer.optimizer.inner
    state = inner.main_params.attach()

    def is_weight() -> bool:
        return all(
            torch.equal(state.of(p).main_param(p.window), inner.weight(p).float())
            for p in inner.plan.pieces
        )

    before = is_weight()
    trainer.optimizer.reload_model_params()
    return [before, is_weight()]


@pytest.mark.parametrize("remainders", [False, True])
def test_main_parameters_follow_weights_that_somebody_changed(remainders: bool) -> None:
    job = Job(bf16=True, overlap=True, bucket_size=3000, adam_mini={"param_remainders": remainders})
    assert run_ranks(3, reloaded, job) == [[False, True]] * 3


def test_phases_called_out_of_order_say_so() -> None:
    assert run_ranks(1, out_of_order, Job()) == [["prepare_grads", "prepare_grads"]]


def out_of_order(job: Job) -> list[str]:
    trainer = Trainer(job)
    found = []
    for call in (trainer.optimizer.get_grad_norm, trainer.optimizer.step_with_ready_grads):
        with pytest.raises(RuntimeError, match="prepare_grads first"):
            call()
        found.append("prepare_grads")
    # A whole step in between makes what was prepared before it worthless.
    trainer.backward(0)
    trainer.optimizer.prepare_grads()
    trainer.optimizer.step()
    with pytest.raises(RuntimeError, match="prepare_grads first"):
        trainer.optimizer.step_with_ready_grads()
    return found


def reloaded_from_a_state_dict(job: Job) -> tuple[bool, bool]:
    """Take main parameters from a state dict; return whether weights stayed, and masters came."""
    trainer = Trainer(job)
    trainer.step(0)
    trainer.sync_params()
    weights = [param.detach().clone() for param in trainer.optimizer.member.model_params]
    given = {name: p.detach() + 3 for name, p in trainer.chunks[0].named_parameters()}
    trainer.optimizer.reload_model_params(given)
    stayed = all(map(torch.equal, weights, trainer.optimizer.member.model_params))
    pieces = zip(
        trainer.optimizer.optimizer.shards, trainer.optimizer.inner.plan.pieces, strict=True
    )
    came = all(
        torch.equal(shard, (weights[p.parameter] + 3).flatten()[p.begin : p.end].float())
        for shard, p in pieces
    )
    return stayed, came


def test_main_parameters_from_a_state_dict_leave_the_weights_alone() -> None:
    """Megatron's optimizer does so, and its callers load the weights themselves."""
    job = Job(bf16=True, bucket_size=3000)
    assert run_ranks(2, reloaded_from_a_state_dict, job) == [(True, True)] * 2
