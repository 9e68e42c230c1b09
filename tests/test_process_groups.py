"""A caller's own process groups: what the optimizer does without, and what it asks for by name."""

from __future__ import annotations

from typing import Any

from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks
from tests.test_checkpoint import load, save

TINY: dict[str, Any] = {
    "layers": 1, "hidden": 16, "heads": 4, "groups": 2, "ffn": 24, "vocab": 16, "batch": 8,
}  # fmt: skip


class OwnGroups(Trainer):
    """A trainer whose optimizer gets some of Megatron's groups, not all."""

    def __init__(self, job: Job, fields: tuple[str, ...]) -> None:
        self.fields = fields
        super().__init__(job)

    def _build_optimizer(self) -> Any:
        from megatron.core import optimizer
        from megatron.core.process_groups_config import ProcessGroupCollection

        groups = ProcessGroupCollection.use_mpu_process_groups(list(self.fields))
        original = optimizer.get_megatron_optimizer
        optimizer.get_megatron_optimizer = lambda *args: original(
            *args, use_gloo_process_groups=False, pg_collection=groups
        )
        try:
            return super()._build_optimizer()
        finally:
            optimizer.get_megatron_optimizer = original


def train_save_and_load(job: Job, fields: tuple[str, ...], folder: str) -> None:
    trainer = OwnGroups(job, fields)
    trainer.step(0)
    trainer.sync_params()
    save(trainer, folder)
    load(trainer, folder)


def refusal(job: Job, fields: tuple[str, ...]) -> str:
    try:
        OwnGroups(job, fields)
    except ValueError as error:
        return str(error)
    return "built"


def test_dense_layers_need_few_groups(tmp_path):
    run_ranks(2, train_save_and_load, Job(tp=2, **TINY), ("tp", "pp"), str(tmp_path))


def test_experts_need_groups_of_their_own(tmp_path):
    job, fields = Job(experts=2, ep=2, **TINY), ("tp", "pp", "ep", "expt_dp")
    run_ranks(2, train_save_and_load, job, fields, str(tmp_path))


def refusals() -> dict[str, str]:
    from megatron.core import parallel_state

    experts = Job(experts=2, ep=2, **TINY)
    cases = {
        "nothing": (Job(**TINY), ()),
        "experts": (experts, ("tp", "pp", "dp")),
        "replicated": (Job(distributed_optimizer=False, **TINY), ("tp", "pp")),
        "buckets": (
            Job(experts=2, ep=2, adam_mini={"checkpoint_format": "buckets"}, **TINY),
            ("tp", "pp", "ep", "expt_dp"),
        ),
    }
    found = {}
    for name, (job, fields) in cases.items():
        found[name] = refusal(job, fields)
        parallel_state.destroy_model_parallel()
    return found


def test_what_is_missing_is_named_on_all_ranks():
    for texts in run_ranks(2, refusals):
        for name, lacks, needs in (
            ("nothing", "tp, pp", "tp, pp"),
            ("experts", "ep, expt_dp", "tp, pp, ep, expt_dp"),
            ("replicated", "mp", "tp, pp, mp"),
            ("buckets", "mp, tp_ep_pp", "tp, pp, mp, ep, expt_dp, tp_ep_pp"),
        ):
            text = texts[name]
            assert (
                f"lacks the process groups {lacks}, of which Adam-mini needs {needs} here" in text
            )
            assert "Remedy: set these fields" in text
