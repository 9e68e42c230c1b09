"""Recipes of Megatron-Bridge with Adam-mini: its config, the training, metrics and checkpoints.

Bridge itself is not installed here; ``bridge_double`` does what it does. The last test takes the
real classes where they are installed, and ``tools/bridge_check.py`` trains with them.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_adam_mini import AdamMiniConfig
from tests import bridge_double
from tests.megatron_job import Job, Trainer, global_names
from tests.ranks import RankError, run_ranks
from tests.test_checkpoint import load, save
from tests.test_frameworks import bits

#: Two data-parallel ranks with rows that are cut between them.
JOB = Job(hidden=56, heads=4, groups=2, ffn=120, vocab=96, layers=1, bf16=True, batch=8)
RULES = (("*.mlp.linear_fc2.weight", "element"),)
#: What recipes of DeepSeek, Moonlight, GLM and others set for Megatron's Adam.
LOW_PRECISION = {
    "use_precision_aware_optimizer": True,
    "main_grads_dtype": torch.bfloat16,
    "exp_avg_dtype": torch.bfloat16,
    "exp_avg_sq_dtype": torch.bfloat16,
}
SCHEDULE: dict[str, Any] = {
    "init_lr": 0.0,
    "lr_warmup_steps": 2,
    "lr_decay_steps": 8,
    "lr_decay_style": "cosine",
    "start_wd": 0.1,
    "end_wd": 0.1,
    "wd_incr_steps": 8,
    "wd_incr_style": "constant",
}


def recipes_config(job: Job, **changes: Any) -> Any:
    """Return the optimizer's config of a recipe, which names Adam."""
    from megatron.bridge.training.config import OptimizerConfig

    values: dict[str, Any] = {
        "optimizer": "adam",
        "lr": job.lr,
        "min_lr": 0.0,
        "weight_decay": job.weight_decay,
        "adam_beta2": 0.95,
        "clip_grad": job.clip_grad,
        "bf16": job.bf16,
        "params_dtype": torch.bfloat16 if job.bf16 else torch.float32,
        "use_distributed_optimizer": True,
    }
    return OptimizerConfig(**values | changes)


def standard_overrides(config: Any) -> Any:
    from megatron.core.optimizer import get_standard_config_overrides

    return get_standard_config_overrides(config)


def slower_output(config: Any) -> Any:
    """Return the overrides of a recipe with a provider of its own."""
    from megatron.core.optimizer import ParamGroupOverride, ParamKey

    own = {ParamKey(name="*output_layer.weight"): ParamGroupOverride(max_lr=config.lr / 4)}
    return {**standard_overrides(config), **own}


class ScheduledTrainer(Trainer):
    """The scheduler steps after each step."""

    scheduler: Any

    def step(self, step: int) -> Any:
        result = super().step(step)
        self.scheduler.step(increment=1)
        return result


class BridgeTrainer(ScheduledTrainer):
    """Builds its optimizer as Bridge does."""

    def __init__(self, job: Job, config: Any, overrides: Any = standard_overrides, **args: Any):
        self.given = config, overrides, args
        super().__init__(job)

    def _build_optimizer(self) -> Any:
        config, overrides, args = self.given
        if args.get("pg_collection"):
            from megatron.core.process_groups_config import ProcessGroupCollection

            args["pg_collection"] = ProcessGroupCollection.use_mpu_process_groups()
        optimizer, self.scheduler = bridge_double.setup_optimizer(
            config, SCHEDULE, self.chunks, overrides, **args
        )
        return optimizer


class MegatronTrainer(ScheduledTrainer):
    """The same schedule with the config and the call of Megatron."""

    def _build_optimizer(self) -> Any:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        optimizer = super()._build_optimizer()
        self.scheduler = OptimizerParamScheduler(
            optimizer, max_lr=self.job.lr, min_lr=0.0, **SCHEDULE
        )
        return optimizer


# The config.


def lives(values: dict[str, Any]) -> None:
    """Take a config through all that Bridge does to one, and look whether it is still the same."""
    from megatron_adam_mini.mcore.bridge import AdamMiniOptimizerConfig

    made = AdamMiniOptimizerConfig.like(recipes_config(JOB, **LOW_PRECISION), **values)
    wanted = made.options()
    assert made.optimizer == "adam_mini"
    assert made.exp_avg_sq_dtype == torch.bfloat16
    read = bridge_double.from_text(bridge_double.to_text(replace(made, timers=SimpleNamespace())))
    assert read.options() == wanted  # Bridge sets timers, which do not survive
    read = bridge_double.from_text(bridge_double.to_text(made))
    assert type(read) is AdamMiniOptimizerConfig
    for other in (read, copy.deepcopy(made), replace(made), AdamMiniOptimizerConfig.like(made)):
        assert other.options() == wanted
        assert bridge_double.to_text(other) == bridge_double.to_text(made)
    bridge_double.override(read, {"lr": 1.0})
    assert read.options() == wanted
    assert read.lr == 1.0
    bridge_double.override(read, {"adam_mini_preset": "tensor", "exp_avg_dtype": "torch.float32"})
    assert read.options() == replace(wanted, preset="tensor", exp_avg_dtype="fp32")
    read.finalize()
    assert read.adam_mini.preset == "tensor"
    read.adam_mini_preset = "first"  # after finalize()
    assert replace(read).options().preset == "first"


def defaults(_: Any) -> dict[str, Any]:
    from megatron_adam_mini.mcore.bridge import AdamMiniOptimizerConfig

    return {
        f.name.removeprefix("adam_mini_"): f.default
        for f in fields(AdamMiniOptimizerConfig)
        if f.name.startswith("adam_mini_")
    }


def with_double(function: Any, *args: Any) -> Any:
    bridge_double.install()
    return function(*args)


def test_the_config_has_all_options():
    (found,) = run_ranks(1, with_double, defaults, None)
    wanted = {field.name: field.default for field in fields(AdamMiniConfig)}
    assert MISSING not in wanted.values()
    assert wanted.pop("exp_avg_dtype") == "fp32"  # Megatron has that field
    assert found == wanted


@pytest.mark.parametrize(
    "values",
    [{}, {"adam_mini_rules": RULES, "adam_mini_full_v": ("*.b",), "adam_mini_single_phase": True}],
)
def test_a_config_survives_files_overrides_and_copies(values: dict[str, Any]):
    run_ranks(1, with_double, lives, values)


def refused(values: dict[str, Any]) -> None:
    from megatron_adam_mini.mcore.bridge import AdamMiniOptimizerConfig

    AdamMiniOptimizerConfig(**values).finalize()


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        ({"optimizer": "adam"}, "ValueError", "allowed is 'adam_mini'"),
        ({"adam_mini_preset": "rows"}, "ValueError", "preset='rows' is not known"),
        ({"exp_avg_dtype": torch.float16}, "ValueError", "exp_avg_dtype='fp16'"),
        ({"exp_avg_sq_dtype": torch.bfloat16}, "NotImplementedError", "--exp-avg-sq-dtype bf16"),
        ({"adam_mini_stochastic_rounding": True}, "ValueError", "exp_avg_dtype='bf16'"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_built(
    values: dict[str, Any], kind: str, text: str
):
    with pytest.raises(RankError) as caught:
        run_ranks(1, with_double, refused, values)
    ((found, message),) = caught.value.errors.values()
    assert found == kind
    assert text in message


# The training.


def train_by_bridge(job: Job, changes: dict[str, Any], args: dict[str, Any]) -> str:
    from megatron_adam_mini.mcore.bridge import AdamMiniOptimizerConfig

    given = {} if "use_precision_aware_optimizer" not in changes else LOW_PRECISION
    own = {key: value for key, value in changes.items() if key not in given}
    config = AdamMiniOptimizerConfig.like(recipes_config(job, **given), **own)
    config.finalize()
    trainer = BridgeTrainer(job, config, **args)
    for step in range(3):
        trainer.step(step)
    return bits(trainer)


def train_by_megatron(job: Job) -> str:
    trainer = MegatronTrainer(job)
    for step in range(3):
        trainer.step(step)
    return bits(trainer)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "own options": (
        {"adam_mini_rules": RULES, "adam_mini_preset": "first"},
        {"rules": RULES, "preset": "first"},
        {"pg_collection": True},
    ),
    "low precision": (
        {"use_precision_aware_optimizer": True},
        {"param_remainders": True, "exp_avg_dtype": "bf16"},
        {},
    ),
}


@pytest.mark.support("Megatron-Bridge: recipes, YAML, overrides, scheduler, metrics", "test")
@pytest.mark.parametrize("case", CASES)
def test_bridge_trains_as_megatron_does(case: str):
    """Bridge's calls, with its process groups or Megatron's, come to the same bits."""
    changes, options, args = CASES[case]
    found = run_ranks(2, with_double, train_by_bridge, JOB, changes, args)
    assert found == run_ranks(2, train_by_megatron, replace(JOB, adam_mini=options))


def rates(job: Job) -> tuple[list[dict[str, float]], dict[str, float]]:
    from megatron.bridge.training.callbacks import CallbackContext

    from megatron_adam_mini.mcore.bridge import AdamMiniMetrics, AdamMiniOptimizerConfig

    config = AdamMiniOptimizerConfig.like(recipes_config(job))
    config.finalize()
    trainer = BridgeTrainer(job, config, slower_output)
    names = {p.data_ptr(): name for name, p in global_names(trainer.chunks).items()}
    seen = []
    written: dict[int, dict[str, Any]] = {}
    state = SimpleNamespace(
        train_state=SimpleNamespace(step=0),
        cfg=SimpleNamespace(logger=SimpleNamespace(tensorboard_log_interval=2)),
        tensorboard_logger=SimpleNamespace(
            add_scalar=lambda name, value, at: written.setdefault(at, {}).update({name: value})
        ),
        wandb_logger=None,
    )
    for step in range(2):
        trainer.step(step)
        state.train_state.step = step
        AdamMiniMetrics().on_train_step_end(CallbackContext(state, optimizer=trainer.optimizer))
        groups = trainer.optimizer.optimizer.param_groups
        seen.append({names[p.data_ptr()]: g["lr"] for g in groups for p in g["params"]})
    assert set(written) == {2}
    assert set(seen[0]) == set(names.values())
    return seen, written[2]


def test_schedule_overrides_and_metrics():
    for seen, metrics in run_ranks(1, with_double, rates, replace(JOB, bf16=False)):
        for step, by_name in enumerate(seen, 1):
            for name, rate in by_name.items():
                full = JOB.lr * min(step / 2, 1)
                assert rate == pytest.approx(full / 4 if "output_layer" in name else full), name
        assert metrics["adam-mini/state-bytes/exp_avg"] > 0


# Checkpoints: Bridge's are Megatron's, see test_checkpoint.py; the config is the one thing of ours.


def save_by_bridge(job: Job, folder: str) -> str:
    from megatron_adam_mini.mcore.bridge import AdamMiniOptimizerConfig

    config = AdamMiniOptimizerConfig.like(recipes_config(job), adam_mini_preset="first")
    text = bridge_double.to_text(config)
    config.finalize()
    trainer = BridgeTrainer(job, config)
    trainer.step(0)
    save(trainer, folder)
    Path(folder, f"{trainer.dp_rank}.config").write_text(text)
    trainer.step(1)
    return bits(trainer)


def load_by_bridge(job: Job, folder: str) -> str:
    import megatron_adam_mini.mcore.bridge  # noqa: F401 (it allows its class)

    config = bridge_double.from_text(Path(folder, "0.config").read_text())
    config.finalize()
    trainer = BridgeTrainer(job, config)
    load(trainer, folder)
    trainer.scheduler.step(increment=1)
    trainer.step(1)
    return bits(trainer)


def test_a_run_goes_on_from_its_checkpoint_and_config(tmp_path: Path):
    saved = run_ranks(2, with_double, save_by_bridge, JOB, str(tmp_path))
    assert run_ranks(2, with_double, load_by_bridge, JOB, str(tmp_path)) == saved


# The real Bridge.


def real_class(folder: str) -> None:
    from tools.bridge_check import import_bridge

    import_bridge()
    from megatron.bridge.training.config import OptimizerConfig
    from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
    from megatron.bridge.utils.instantiate_utils import instantiate

    from megatron_adam_mini.mcore.bridge import AdamMiniOptimizerConfig

    values = {"adam_mini_rules": RULES, "adam_mini_preset": "first"}
    config = AdamMiniOptimizerConfig.like(OptimizerConfig(**LOW_PRECISION), **values)
    wanted = config.options()
    read = instantiate(_ConfigContainerBase._convert_value_to_dict(config))
    assert read.options() == wanted
    changed = process_config_with_overrides(read, cli_overrides=["adam_mini_preset=tensor"])
    assert changed.options() == replace(wanted, preset="tensor")
    changed.bf16 = True
    changed.finalize()
    assert changed.adam_mini == changed.options()


def has_bridge() -> bool:
    return importlib.util.find_spec("megatron.bridge") is not None


@pytest.mark.skipif(not has_bridge(), reason="Megatron-Bridge is not installed")
def test_the_real_class(tmp_path: Path):
    run_ranks(1, real_class, str(tmp_path))
