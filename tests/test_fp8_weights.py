"""FP8 weights (``--fp8-param-gather``), with a stand-in for Transformer Engine's tensors.

Never run with Transformer Engine, nor on hardware that computes in FP8.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megatron_adam_mini
from tests.fp8_weights import LARGEST, QUANTIZED
from tests.gather import Part, nearest_bfloat16, slices_of, weights_of, whole_tensors
from tests.megatron_job import Job, Trainer, global_names, whole_weight
from tests.ranks import run_ranks
from tests.reference import WholeTensorAdamMini
from tests.test_bridge import LOW_PRECISION
from tests.test_checkpoint import load, save
from tests.test_oracle import (
    BETAS,
    SAME_GRADIENT_TOLERANCE,
    assert_close,
    decay_of,
    labels_of,
    sharded_run,
    world_of,
)

FP8 = "FP8 parameters, with a stand-in for Transformer Engine's"
#: Buckets cut rows and heads.
JOB = Job(bf16=True, bucket_size=4000, steps=4, fp8="current")
#: Job and data-parallel size.
LAYOUTS = {
    "dp2": (JOB, 2),
    "dp3, overlap": (replace(JOB, overlap=True), 3),
    "tp2, dp2, delayed scaling, overlap": (replace(JOB, tp=2, fp8="delayed", overlap=True), 2),
    "experts, ep2, dp2": (replace(JOB, experts=4, ep=2, groups=8), 2),
}


def shards(ranks: list[list[Part]], key: str) -> dict[tuple[str, int], torch.Tensor]:
    """Put tensor-parallel shards together; every copy of an element must be the same."""
    found: dict[tuple[str, int], np.ndarray] = {}
    for part in (part for parts in ranks for part in parts):
        where = part.name, part.tp_rank
        flat = found.setdefault(where, np.full(int(np.prod(part.shape)), np.nan, np.float32))
        window = flat[part.begin : part.begin + len(part.values[key])]
        assert (np.isnan(window) | (window == part.values[key])).all(), f"{where}: copies differ"
        window[:] = part.values[key]
    assert not any(np.isnan(flat).any() for flat in found.values())
    return {where: torch.from_numpy(flat) for where, flat in found.items()}


def quantized(name: str, main: torch.Tensor) -> torch.Tensor:
    """Return the weights that belong to a shard's main parameters, with current scaling."""
    if not name.endswith(QUANTIZED):
        return nearest_bfloat16(main)
    scale = LARGEST / main.abs().max()
    numbers = (main.bfloat16().float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (numbers.float() * (1.0 / scale)).bfloat16().float()


@pytest.mark.support(FP8, "oracle")
@pytest.mark.parametrize("case", LAYOUTS)
def test_main_parameters_and_v_are_those_of_whole_tensors(case: str) -> None:
    job, dp = LAYOUTS[case]
    ranks = run_ranks(world_of(job, dp), sharded_run, job)
    start = whole_tensors([r["initial"] for r in ranks], "param", job)
    oracle = {}
    for name, value in start.items():
        # Main parameters start from what the weights were quantized from.
        assert torch.equal(value, whole_weight(name, tuple(value.shape)).bfloat16().float()), name
        oracle[name] = WholeTensorAdamMini(value, labels_of(name, tuple(value.shape), job))
    for step in range(job.steps):
        grads = whole_tensors([r["grads"][step] for r in ranks], "grad", job)
        norm = float(sum(g.double().square().sum() for g in grads.values())) ** 0.5
        for name, one in oracle.items():
            decay = decay_of(tuple(grads[name].shape), job)
            grad = grads[name].double() * min(1.0, job.clip_grad / (norm + 1e-6))
            one.step(grad, lr=job.lr, weight_decay=decay, **BETAS)
    for key in ("param", "exp_avg", "v"):
        final = whole_tensors([r["final"] for r in ranks], key, job)
        for name, one in oracle.items():
            expected = one.v_of_elements() if key == "v" else getattr(one, key)
            assert_close(final[name], expected, SAME_GRADIENT_TOLERANCE, f"{key} {name}")
    main = shards([r["final"] for r in ranks], "param")
    weights = shards([r["weights"] for r in ranks], "weight")
    assert weights.keys() == main.keys()
    assert any(name.endswith(QUANTIZED) for name, _ in weights)
    for (name, rank), weight in weights.items():
        if job.fp8 == "current" or not name.endswith(QUANTIZED):
            assert torch.equal(weight, quantized(name, main[name, rank])), name
        else:  # the scale is that of the step before
            assert_close(weight, main[name, rank], 2**-3, name)


def bytes_of(trainer: Trainer) -> list[Any]:
    return [
        [t.clone() for t in (p._data, p._scale_inv, p._amax)]
        for p in global_names(trainer.chunks).values()
        if hasattr(p, "_data")
    ]


def skipped(job: Job) -> list[bool]:
    trainer = Trainer(job)
    trainer.step(0)
    before = slices_of(trainer), bytes_of(trainer)
    trainer.backward(1)
    for chunk in trainer.chunks:
        for param in chunk.parameters():
            param.main_grad.fill_(float("nan"))
    updated, _, _ = trainer.optimizer.step()
    after = slices_of(trainer), bytes_of(trainer)
    same = all(
        (one.values[key] == other.values[key]).all()
        for one, other in zip(before[0], after[0], strict=True)
        for key in ("param", "exp_avg", "v")
    )
    same_bytes = all(
        torch.equal(one, other)
        for weight, others in zip(before[1], after[1], strict=True)
        for one, other in zip(weight, others, strict=True)
    )
    taken = trainer.step(2)[0]
    moved = any(
        not torch.equal(a[0], b[0]) for a, b in zip(after[1], bytes_of(trainer), strict=True)
    )
    return [updated, same, same_bytes, taken, moved]


def test_a_skipped_step_changes_nothing() -> None:
    # Delayed scaling: to quantize the same main parameters once more would change the scale.
    found = run_ranks(2, skipped, replace(JOB, fp8="delayed"))
    assert found == [[False, True, True, True, True]] * 2


def trained_by_recipe(job: Job) -> Any:
    """Register before the config is made, which then may have Megatron's fields."""
    megatron_adam_mini.register()
    trainer = Trainer(job)
    for step in range(job.steps):
        assert trainer.step(step)[0]
    return trainer.optimizer.state_bytes(), [p.values for p in slices_of(trainer)]


def test_a_recipe_for_megatrons_precision_aware_adam_keeps_float32_main_parameters() -> None:
    """As Megatron does where weights are FP8."""
    job = replace(JOB, optimizer_args=LOW_PRECISION)
    own = replace(JOB, adam_mini={"exp_avg_dtype": "bf16"})
    found, wanted = (run_ranks(2, trained_by_recipe, one) for one in (job, own))
    for (num_bytes, values), (own_bytes, own_values) in zip(found, wanted, strict=True):
        assert num_bytes == own_bytes
        assert num_bytes["main_param"] == 2 * num_bytes["exp_avg"]
        for one, other in zip(values, own_values, strict=True):
            assert all((one[key] == other[key]).all() for key in one)


def refused(job: Job) -> str:
    with pytest.raises(NotImplementedError) as caught:
        Trainer(job)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"optimizer_args": {"optimizer_cpu_offload": True}}, "with --optimizer-cpu-offload: a"),
        ({"adam_mini": {"param_remainders": True}}, "with 16-bit remainders (--adam-mini-param"),
        ({"config_args": {"qk_clip": True}}, "with --qk-clip: it scales rows"),
        ({"distributed_optimizer": False}, "Remedy: add --use-distributed-optimizer."),
        ({"bf16": False}, "is FP8 in the place of torch.float32. Train with --bf16 or --fp16."),
    ],
)
def test_what_does_not_go_with_fp8_weights_is_refused(changed: dict[str, Any], text: str) -> None:
    (found,) = run_ranks(1, refused, replace(JOB, **changed))
    assert text in found


def other_kinds() -> list[str | None]:
    """Return why the other kinds of quantized weights are refused."""
    from unittest import mock

    from megatron.core import fp4_utils, fp8_utils

    from megatron_adam_mini.mcore.quantized import refusal

    kinds = (
        (fp8_utils, "is_mxfp8tensor"),
        (fp4_utils, "is_nvfp4tensor"),
        (fp8_utils, "is_grouped_tensor_with_quantized_storage"),
    )
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    found = []
    for module, name in kinds:
        with mock.patch.object(module, name, return_value=True):
            found.append(refusal(param))
    return [*found, refusal(param)]


def test_other_kinds_of_quantized_weights_are_refused() -> None:
    ((mxfp8, nvfp4, grouped, fp8),) = run_ranks(1, other_kinds)
    assert "is MXFP8" in mxfp8
    assert "is NVFP4" in nvfp4
    assert "is one tensor of several experts" in grouped
    assert fp8 is None


def train_and_save(job: Job, folder: str) -> Any:
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    trainer.sync_params()
    save(trainer, folder)
    return slices_of(trainer), weights_of(trainer)


def load_and_show(job: Job, folder: str) -> Any:
    trainer = Trainer(job)
    load(trainer, folder)
    trainer.sync_params()
    return slices_of(trainer), weights_of(trainer)


@pytest.mark.support(FP8, "reshard")
def test_a_checkpoint_loads_under_another_layout_and_without_fp8(tmp_path: Path) -> None:
    saved = run_ranks(2, train_and_save, JOB, str(tmp_path))
    other = replace(JOB, tp=2)
    for job, world in (
        (replace(JOB, bucket_size=None), 3),
        (other, 2),
        (replace(JOB, fp8=None), 2),
    ):
        loaded = run_ranks(world, load_and_show, job, str(tmp_path))
        for key in ("param", "exp_avg", "v"):
            expected = whole_tensors([r[0] for r in saved], key, JOB)
            found = whole_tensors([r[0] for r in loaded], key, job)
            assert all(torch.equal(found[name], expected[name]) for name in expected), key
        main = shards([r[0] for r in loaded], "param")
        for (name, rank), weight in shards([r[1] for r in loaded], "weight").items():
            values = main[name, rank]
            assert torch.equal(
                weight, quantized(name, values) if job.fp8 else nearest_bfloat16(values)
            )
