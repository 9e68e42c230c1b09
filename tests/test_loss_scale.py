"""fp16 and loss scales: the same steps are skipped, and scales change, as with Megatron's Adam.

Both train in Megatron's loop; in the same iterations, reduced gradients are made Inf.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.training_run import Run, Seen, assert_same_state, make_dataset, train

#: Of 12 iterations. Two that are not finite lower the scale, two good ones in a row raise it.
DYNAMIC = (
    "--fp16 --initial-loss-scale 1024 --min-loss-scale 256 --hysteresis 2 --loss-scale-window 2"
)
NON_FINITE = (1, 2, 5, 6, 7, 8, 10)
BATCHES = "--global-batch-size 4 --train-iters 12"
#: Flags, and the ranks whose gradients are Inf: all data-parallel ones, of which the last owns the
#: element; one of two tensor-parallel ones.
CASES = {
    "dynamic, dp2": (DYNAMIC, (0, 1)),
    "dynamic, tp2, fp32 gradients": (
        f"{DYNAMIC} --tensor-model-parallel-size 2 --accumulate-allreduce-grads-in-fp32",
        (1,),
    ),
    "constant, tp2": ("--fp16 --loss-scale 512 --tensor-model-parallel-size 2", (1,)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data") / "bytes")


def both(run: Run) -> list[Seen]:
    """Do a run with Adam-mini and with Adam, which must see the same; return what ranks saw."""
    mini, adam = (
        run_ranks(
            2, train, replace(run, optimizer=name, flags=run.flags.replace("OPTIMIZER", name))
        )
        for name in ("adam_mini", "adam")
    )
    for ours, theirs in zip(mini, adam, strict=True):
        assert ours.error is theirs.error is None, (ours.error, theirs.error)
        assert ours.scaler == theirs.scaler
        # Rates and decay do not advance in a skipped step.
        assert ours.steps == theirs.steps
        assert ours.samples == theirs.samples
    assert mini[0].scaler == mini[1].scaler
    return mini


@pytest.mark.support("gradient norm, zeros, skipped steps as Megatron's Adam", "test")
@pytest.mark.parametrize("case", CASES)
def test_skipped_steps_and_loss_scale_are_adams_also_after_a_resume(
    case: str, data: str, tmp_path: Path
) -> None:
    flags, ranks = CASES[case]
    folder = tmp_path / "OPTIMIZER"
    # Saved after a good and a bad iteration, within what the scaler counts.
    run = Run(
        f"{data} {flags} {BATCHES} --save {folder} --save-interval 4",
        bf16=False,
        non_finite=NON_FINITE,
        non_finite_on=ranks,
    )
    whole, _ = both(run)
    skipped = [number for number, (updated, *_) in enumerate(whole.scaler) if not updated]
    assert tuple(skipped) == NON_FINITE
    if case.startswith("dynamic"):
        scales = [dict(values)["scale"] for _, _, *values in whole.scaler]
        assert {*scales} == {1024.0, 512.0, 256.0}, "raised, lowered, and at the minimum"
        counts = dict(whole.scaler[3][2:])
        assert (counts["growth_tracker"], counts["hysteresis_tracker"]) == (1, 0)
    resumed, _ = both(replace(run, flags=f"{data} {flags} {BATCHES} --load {folder} --ckpt-step 4"))
    assert resumed.scaler == whole.scaler[4:]
    assert_same_state(resumed.end, whole.end)


EXPERTS = (
    "--num-experts 4 --expert-model-parallel-size 2 --moe-router-topk 2 "
    "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none"
)


@pytest.mark.parametrize(
    ("spoiled", "ranks"),
    [("", (0, 1)), ("experts.local_experts.1.linear_fc1", (1,))],
    ids=["all parameters", "one expert of one rank"],
)
def test_experts_are_skipped_with_all_others_and_share_the_loss_scale(
    spoiled: str, ranks: tuple[int, ...], data: str
) -> None:
    """Both skip the same steps, on all ranks, and the scale follows Adam's scaler for experts.

    Where experts alone are Inf, that of Adam's dense parameters, by which it scales the loss, goes
    on growing, and gradients of experts are divided by another scale than the loss was multiplied
    with.
    """
    run = Run(
        f"{data} {DYNAMIC} {EXPERTS} {BATCHES}",
        bf16=False,
        non_finite=NON_FINITE,
        non_finite_on=ranks,
        non_finite_in=spoiled,
    )
    seen, _ = both(run)
    skipped = [number for number, (updated, *_) in enumerate(seen.scaler) if not updated]
    assert tuple(skipped) == NON_FINITE
    assert any("experts" in name for name in seen.steps[0])
