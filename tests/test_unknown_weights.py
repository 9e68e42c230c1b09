"""Weights whose names Adam-mini does not know: an error where they are many, unless it is meant."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.convert import from_adam
from megatron_adam_mini.estimate.buckets import stage_blocks
from megatron_adam_mini.estimate.models import MODELS
from megatron_adam_mini.estimate.parallel import Parallel
from megatron_adam_mini.plan import manifest as plan_manifest
from megatron_adam_mini.plan import parameter_info
from megatron_adam_mini.plan.manifest import MAX_UNKNOWN_SHARE, manifest_of, unknown_problem
from megatron_adam_mini.plan.parameter_info import ParameterInfo
from megatron_adam_mini.plan.partition import partition_parameter
from megatron_adam_mini.plan.roles import role_of
from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks
from tests.test_checkpoint import compare, load_and_show, train_and_save

KERNEL = "decoder.layers.{}.mixer.kernel"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"
JOB = Job(layers=2, hidden=32, bf16=True, steps=2)


def problem(shapes: dict[str, tuple[int, ...]], **options: Any) -> str | None:
    """Return what is wrong with a model of 10,000 known elements and these parameters."""
    config = AdamMiniConfig(**options)
    known = {"decoder.layers.0.mlp.linear_fc1.weight": (100, 100)}
    infos = [ParameterInfo.of(n, shape, lambda _: None) for n, shape in (known | shapes).items()]
    return unknown_problem(
        manifest_of([partition_parameter(info, config).manifest_entry() for info in infos], config)
    )


def test_a_hundredth_is_allowed() -> None:
    assert MAX_UNKNOWN_SHARE == 0.01
    assert problem({KERNEL.format(0): (10, 10)}) is None
    text = str(problem({KERNEL.format(0): (10, 11), KERNEL.format(12): (10, 1)}))
    assert text == (
        "Weights that Adam-mini does not know have 1.2 % of the trained elements (allowed: 1 %)"
        " and would keep Adam's whole state: 'decoder.layers.*.mixer.kernel'. Remedy: give them a "
        'rule, with --adam-mini-rules FILE, a JSON object such as {"decoder.layers.*.mixer.kernel":'
        " \"row\"}; or accept it, with --adam-mini-full-v 'decoder.layers.*.mixer.kernel' "
        "(AdamMiniConfig: rules, full_v)."
    )


def test_many_names_are_counted() -> None:
    text = str(problem({f"decoder.{letter}": (10, 10) for letter in "abcdefgh"}))
    assert text.count("'decoder.e' and 3 more") == 2
    assert "decoder.f" not in text


def test_no_row_is_advised_where_it_may_be_a_whole_matrix() -> None:
    """As of adapters of grouped experts, which Megatron-Bridge keeps in one weight."""
    name = "decoder.layers.3.mlp.experts.linear_fc1.adapter.linear_in.weight"
    text = str(problem({name: (8, 4, 16)}))
    assert "Remedy: accept it, with --adam-mini-full-v 'decoder.layers.*" in text
    assert "only if each index of dimension 0 is one output neuron" in text
    both = str(problem({name: (8, 4, 16), KERNEL.format(0): (9, 9)}))
    assert f'{{"{KERNEL.format("*")}": "row"}}; or accept it' in both


@pytest.mark.parametrize(
    "options",
    [
        {"full_v": ("*.mixer.*",)},
        {"rules": (("*.kernel", "row"),)},
        {"rules": (("*.kernel", "element"),)},
    ],
)
def test_what_a_pattern_matches_is_not_unknown(options: Any) -> None:
    assert problem({KERNEL.format(0): (50, 50)}, **options) is None


def test_what_is_elementwise_by_the_preset_is_not_unknown() -> None:
    assert problem({"embedding.word_embeddings.weight": (50, 50)}, preset="first") is None


def test_vectors_do_not_count() -> None:
    """As of adapters with a magnitude: by row they would keep as many second moments."""
    assert problem({"decoder.layers.0.adapter.weight_magnitude": (5000,)}) is None


@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_planner_are_known(name: str) -> None:
    chunks = stage_blocks(MODELS[name], Parallel(), AdamMiniConfig(), pp_rank=0)
    assert all(blocks.info.role != "unknown" for chunk in chunks for blocks in chunk)


def test_a_conversion_says_what_the_run_will(caplog: pytest.LogCaptureFixture) -> None:
    info = ParameterInfo.of(KERNEL.format(0), (50, 50), lambda _: None)
    for config, warned in ((AdamMiniConfig(), 1), (AdamMiniConfig(full_v=("*.kernel",)), 0)):
        caplog.clear()
        from_adam._identity({info.name: partition_parameter(info, config)}, config, None)
        assert len(caplog.messages) == warned
        assert all("would refuse to start: Weights that" in text for text in caplog.messages)


# In a run.


def forget(names: tuple[str, ...]) -> None:
    """Let Adam-mini not know these weights, as those of a module that Megatron-Core has not."""
    parameter_info.role_of = lambda name, n: "unknown" if name in names else role_of(name, n)


def build(job: Job, names: tuple[str, ...]) -> list[str]:
    forget(names)
    found: list[str] = Trainer(job).optimizer.manifest["elementwise_unknown"]
    return found


def test_all_ranks_refuse_what_one_stage_has() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(2, build, replace(JOB, pp=2), (FC2,))
    texts = {text for kind, text in caught.value.errors.values() if kind == "ValueError"}
    assert len(caught.value.errors) == 2
    (text,) = texts
    assert text.startswith("Weights that Adam-mini does not know have ")
    assert "--adam-mini-full-v 'decoder.layers.*.mlp.linear_fc2.weight'" in text


def save_as_before(job: Job, folder: str) -> Any:
    """Save as a release that did not refuse."""
    plan_manifest.MAX_UNKNOWN_SHARE = math.inf
    forget((FC2,))
    return train_and_save(job, folder)


def load_accepted(job: Job, folder: str) -> Any:
    forget((FC2,))
    return load_and_show(job, folder)


def test_a_checkpoint_of_before_loads_once_it_is_accepted(tmp_path: Path) -> None:
    saved = run_ranks(1, save_as_before, JOB, str(tmp_path))
    accepted = replace(JOB, adam_mini={"full_v": ["*.1.mlp.linear_fc2.weight"]})
    compare(saved, JOB, run_ranks(1, load_accepted, accepted, str(tmp_path)), accepted)


def test_fewer_are_listed() -> None:
    (names,) = run_ranks(1, build, JOB, ("decoder.final_layernorm.weight",))
    assert names == ["decoder.final_layernorm.weight"]
