"""Checkpoints: saved under one layout, loaded under another, every value bit for bit."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.config import CHECKPOINT_FORMATS, AdamMiniConfig
from megatron_adam_mini.plan.manifest import manifest_of, partition_fields, partition_of_checkpoint
from megatron_adam_mini.plan.parameter_info import ParameterInfo
from megatron_adam_mini.plan.partition import partition_parameter
from tests.gather import Part, nearest_bfloat16, slices_of, weights_of, whole_tensors
from tests.megatron_job import Job, Trainer, global_names
from tests.ranks import RankError, run_ranks
from tests.test_oracle import is_output, labels_of

# Hidden 56 pads buckets, small buckets cut rows, heads and norms.
BASE = Job(
    hidden=56, heads=4, groups=2, ffn=120, vocab=96, layers=4, bf16=True, overlap=True,
    bucket_size=3000, steps=3,
)  # fmt: skip
STATE = ("param", "exp_avg", "v")


def unwrapped(trainer: Trainer) -> list[Any]:
    from megatron.core.utils import unwrap_model

    return unwrap_model(trainer.chunks)


def model_state(trainer: Trainer, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the model's sharded state dict under the names that Megatron uses."""
    chunks = unwrapped(trainer)
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(names, chunks, strict=True)
    }


def metadata_of(sharding: str | None) -> dict[str, Any]:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = {
        "dp_cp_group": group,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    return found | ({"distrib_optim_sharding_type": sharding} if sharding else {})


def save(
    trainer: Trainer, folder: str, sharding: str | None = "fully_reshardable", *, wait: bool = True
) -> Any:
    """Save as megatron.training does, fully parallel; return the request if not to wait for it."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.filesystem_async import (
        get_write_results_queue,
    )
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.dist_checkpointing.utils import _clean_metadata_for_serialization

    # The writer's results come back through a process that is forked here, not spawned: importing
    # torch once more per rank would take longer than the test.
    get_write_results_queue("fork")
    metadata = metadata_of(sharding)
    state = model_state(trainer, metadata)
    state["optimizer"] = trainer.optimizer.sharded_state_dict(state, metadata=metadata)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    parameters = inspect.signature(dist_checkpointing.save).parameters
    known = {"async_strategy": "mcore"} if "async_strategy" in parameters else {}  # since 0.17
    return dist_checkpointing.save(
        state,
        folder,
        FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), group),
        async_sharded_save=not wait,
        **known,
        content_metadata=_clean_metadata_for_serialization(metadata),
    )


def load(trainer: Trainer, folder: str, *, parallel: bool = False) -> None:
    """Load as megatron.training does."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    metadata = dist_checkpointing.load_content_metadata(folder) or {}
    metadata |= {"dp_cp_group": metadata_of(None)["dp_cp_group"]}
    state = model_state(trainer, metadata)
    state["optimizer"] = trainer.optimizer.sharded_state_dict(
        state, is_loading=True, metadata=metadata
    )
    strategy: Any = TorchDistLoadShardedStrategy()
    if parallel:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelLoadStrategyWrapper(strategy, group)
    loaded = dist_checkpointing.load(state, folder, strategy, strict="raise_all")
    for index, chunk in enumerate(unwrapped(trainer)):
        chunk.load_state_dict(loaded["model" if len(trainer.chunks) == 1 else f"model{index}"])
    trainer.optimizer.load_state_dict(loaded["optimizer"])


def train_and_save(job: Job, folder: str, sharding: str | None = "fully_reshardable") -> Any:
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    save(trainer, folder, sharding)
    return slices_of(trainer), weights_of(trainer)


def load_and_show(job: Job, folder: str, parallel: bool = False) -> Any:
    trainer = Trainer(job)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1.0  # the saved one must come back
    load(trainer, folder, parallel=parallel)
    optimizer = trainer.optimizer
    found = slices_of(trainer), weights_of(trainer), optimizer.inner.main_params.step_count
    return *found, [group["lr"] for group in optimizer.param_groups]


def compare(saved: list[Any], saved_job: Job, loaded: list[Any], job: Job) -> None:
    """Compare every state value and every weight, bit for bit, beyond padded vocabulary rows."""
    for key in STATE:
        before = whole_tensors([r[0] for r in saved], key, saved_job)
        after = whole_tensors([r[0] for r in loaded], key, job)
        tied = {name for name in before.keys() ^ after.keys() if is_output(name)}
        assert before.keys() - tied == after.keys() - tied
        for name, value in after.items():
            assert torch.equal(before[name], value), f"{key} {name}"
            if key == "exp_avg":
                assert value.abs().max() > 0, f"{name}: the state never moved"
    weights = whole_tensors([r[1] for r in loaded], "weight", job)
    masters = whole_tensors([r[0] for r in loaded], "param", job)
    for name, weight in weights.items():
        assert torch.equal(weight, nearest_bfloat16(masters[name])), f"weights {name}"
    assert {r[2] for r in loaded} == {saved_job.steps}
    assert {lr for r in loaded for lr in r[3]} == {saved_job.lr}


LAYOUTS = {
    "tp1-dp1": (BASE, 1),
    "tp1-dp3": (BASE, 3),
    "tp2-pp2-dp2": (replace(BASE, tp=2, pp=2), 8),
    "tp4-cp2": (replace(BASE, tp=4, cp=2), 8),
    "pp2-vpp2-dp1": (replace(BASE, pp=2, vpp=2), 2),
    "pp4-dp1, other buckets": (replace(BASE, pp=4, bucket_size=1), 4),
    "tp2-pp2-dp2, replicated state": (
        replace(BASE, tp=2, pp=2, distributed_optimizer=False),
        8,
    ),
    "tp2-dp2, two instances": (replace(BASE, tp=2, instances=2), 8),
}


# Every layout is written once and read three times; all 64 pairs have been seen to work.
PAIRS = [
    (source, list(LAYOUTS)[(index + step) % len(LAYOUTS)])
    for index, source in enumerate(LAYOUTS)
    for step in (0, 1, 3)
]


@pytest.mark.support(
    {
        "tp2-*": "tensor parallelism",
        "*pp[24]-*": "pipeline parallelism",
        "tp1-dp3": "data parallelism, distributed optimizer",
        "*replicated state": "data parallelism, replicated state",
        "*vpp2*": "virtual pipeline stages",
        "*cp2": "context parallelism",
        "*two instances": "several distributed-optimizer instances",
        "tp4*": "heads, rows and norms cut by any boundary",
        "tp1-dp1": "GPT, Llama: GQA, SwiGLU or GELU, biases",
        "tp2-pp2-dp2": "bf16 with float32 main parameters",
    },
    "reshard",
)
@pytest.mark.parametrize("source", LAYOUTS)
def test_saved_under_one_layout_loads_under_others(source: str, tmp_path: Path) -> None:
    saved_job, world = LAYOUTS[source]
    saved = run_ranks(world, train_and_save, saved_job, str(tmp_path))
    for index, (_, target) in enumerate(pair for pair in PAIRS if pair[0] == source):
        job, load_world = LAYOUTS[target]
        loaded = run_ranks(load_world, load_and_show, job, str(tmp_path), index % 2 == 1)
        compare(saved, saved_job, loaded, job)


#: Storage of the state, each saved by one run and loaded by another.
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16 m, remainders": {"exp_avg_dtype": "bf16", "param_remainders": True},
}


@pytest.mark.support({"bf16 m*": "m in bf16"}, "reshard")
@pytest.mark.support({"bf16 m, remainders*": "16-bit remainders"}, "reshard")
@pytest.mark.parametrize("checkpoint_format", CHECKPOINT_FORMATS)
@pytest.mark.parametrize("source", MODES)
def test_storage_of_the_state_may_change(
    source: str, checkpoint_format: str, tmp_path: Path
) -> None:
    options = MODES[source] | {"checkpoint_format": checkpoint_format}
    saved_job = replace(BASE, tp=2, adam_mini=options)
    saved = run_ranks(4, train_and_save, saved_job, str(tmp_path))
    for options in MODES.values():
        job = replace(saved_job, adam_mini=options)
        loaded = run_ranks(2, load_and_show, job, str(tmp_path))
        expected = saved
        if options:
            # What bfloat16 does not hold is rounded, and nothing else changes.
            expected = [(rounded_m(parts), weights) for parts, weights in saved]
            if source == "float32":
                with pytest.raises(AssertionError, match="exp_avg"):
                    compare(saved, saved_job, loaded, job)
        compare(expected, saved_job, loaded, job)


def test_a_float32_model_gets_the_main_parameters_of_a_bfloat16_one(tmp_path: Path) -> None:
    """Its weights are its main parameters, and those in the checkpoint are rounded."""
    saved_job = replace(BASE, tp=2)
    saved = run_ranks(4, train_and_save, saved_job, str(tmp_path))
    job = replace(BASE, bf16=False)
    loaded = run_ranks(2, load_and_show, job, str(tmp_path))
    for key in STATE:
        before = whole_tensors([r[0] for r in saved], key, saved_job)
        for name, value in whole_tensors([r[0] for r in loaded], key, job).items():
            assert torch.equal(before[name], value), f"{key} {name}"
    assert_weights_are_masters(loaded, job)


def assert_weights_are_masters(loaded: list[Any], job: Job) -> None:
    weights = whole_tensors([r[1] for r in loaded], "weight", job)
    for name, value in whole_tensors([r[0] for r in loaded], "param", job).items():
        assert torch.equal(weights[name], value), name


def rounded_m(parts: list[Part]) -> list[Part]:
    return [
        replace(
            part,
            values=part.values
            | {"exp_avg": nearest_bfloat16(torch.from_numpy(part.values["exp_avg"])).numpy()},
        )
        for part in parts
    ]


def train_while_saving(job: Job, folder: str) -> Any:
    """Take a step while a process that Megatron forks writes the state of the step before."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    queue = AsyncCallsQueue(persistent=False)
    found = slices_of(trainer), weights_of(trainer)
    queue.schedule_async_request(save(trainer, folder, wait=False))
    trainer.step(job.steps)
    queue.maybe_finalize_async_calls(blocking=True)
    return found


def test_a_step_does_not_reach_a_save_that_goes_on_beside_it(tmp_path: Path) -> None:
    job = replace(BASE, tp=2)
    saved = run_ranks(4, train_while_saving, job, str(tmp_path))
    other = replace(BASE, pp=2)
    compare(saved, job, run_ranks(2, load_and_show, other, str(tmp_path)), other)


def test_buckets_change_the_data_parallel_size_and_no_other(tmp_path: Path) -> None:
    saved_job = replace(BASE, tp=2, pp=2, adam_mini={"checkpoint_format": "buckets"})
    saved = run_ranks(8, train_and_save, saved_job, str(tmp_path))
    assert any(
        key.startswith("optimizer.adam_mini.bucket.") for key in Checkpoint(tmp_path).tensors
    )
    job = replace(saved_job, adam_mini={})  # what is loaded may have either format
    compare(saved, saved_job, run_ranks(4, load_and_show, job, str(tmp_path)), job)
    for other in (
        replace(job, tp=1),
        replace(job, pp=1),
        replace(job, distributed_optimizer=False),
    ):
        with pytest.raises(RankError) as caught:
            run_ranks(4, load_and_show, other, str(tmp_path))
        assert len(caught.value.errors) == 4
        remedy = "--use-distributed-optimizer" if other.pp == other.tp else "differ"
        assert all(remedy in text for _, text in caught.value.errors.values())


@pytest.mark.parametrize("sharding", ["dp_reshardable", "fully_reshardable", None])
def test_the_format_does_not_follow_megatrons(sharding: str | None, tmp_path: Path) -> None:
    """Megatron asks for buckets by default; our state loads under any layout all the same."""
    job = replace(BASE, tp=2, steps=1)
    saved = run_ranks(4, train_and_save, job, str(tmp_path), sharding)
    checkpoint = Checkpoint(tmp_path)
    assert not any(".bucket." in key for key in checkpoint.tensors)
    # Megatron refuses to load anything else with other TP or PP sizes.
    assert checkpoint.content["distrib_optim_sharding_type"] == "fully_reshardable"
    other = replace(job, tp=1, pp=2)
    compare(saved, job, run_ranks(2, load_and_show, other, str(tmp_path)), other)


# Other names of the same parameters.

FUSED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def with_fused_names(parts: list[Part]) -> list[Part]:
    return [replace(part, name=fused_name(part.name)) for part in parts]


def fused_name(name: str) -> str:
    for old, new in FUSED_NAMES.items():
        name = name.replace(old, new)
    return name


def manifest_and_stored_keys(job: Job) -> tuple[dict[str, str], dict[str, str]]:
    """Return the keys of the manifest, and those under which Megatron stores, by name."""
    from megatron_adam_mini.mcore.model_space import ModelEntries, ModelEntry

    trainer = Trainer(job)
    entries = ModelEntries(model_state(trainer, metadata_of(None)))
    stored = {}
    for name, param in global_names(trainer.chunks).items():
        flat = torch.empty(param.numel())
        (first, *_) = ModelEntry(entries.find(param), 0).elements("", flat, 0, len(flat))
        stored[name] = first.key
    manifest = trainer.optimizer.manifest["parameters"]
    return {entry["name"]: entry["key"] for entry in manifest}, stored


def test_the_manifest_has_the_keys_that_megatron_stores() -> None:
    ((manifest, stored),) = run_ranks(1, manifest_and_stored_keys, BASE)
    assert manifest == stored
    assert {name for name, key in manifest.items() if name != key} == {
        f"decoder.layers.{i}.{name}" for i in range(BASE.layers) for name in FUSED_NAMES
    }


@pytest.mark.support("Transformer Engine's parameter names", "reshard")
def test_the_implementation_of_the_layers_may_change(tmp_path: Path) -> None:
    """Local layers to fused norms and back, each under another layout."""
    local, fused = replace(BASE, tp=2), replace(BASE, fused_norms=True, pp=2)
    hashes = set()
    for saved_job, job, folder in ((local, fused, tmp_path / "a"), (fused, local, tmp_path / "b")):
        folder.mkdir()
        saved = run_ranks(2, train_and_save, saved_job, str(folder))
        loaded = run_ranks(2, load_and_show, job, str(folder))
        saved = [tuple(with_fused_names(parts) for parts in r) for r in saved]
        loaded = [(*(with_fused_names(parts) for parts in r[:2]), *r[2:]) for r in loaded]
        compare(saved, saved_job, loaded, job)
        hashes.add(Checkpoint(folder).optimizer["adam_mini"]["manifest_hash"])
    assert len(hashes) == 1


def test_checkpoints_whose_manifest_has_names_are_still_read() -> None:
    """As the first ones of this format have it."""
    config = AdamMiniConfig()
    info = ParameterInfo(
        name="decoder.layers.0.input_layernorm.weight",
        key="decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        shape=(8,),
        role="norm",
    )
    blocks = [partition_parameter(info, config)]
    manifest = manifest_of([blocks[0].manifest_entry()], config)
    saved = {"format": 1, "partition": partition_fields(config), "manifest_hash": "another"}
    for key in (info.name, info.key):
        identity = {**saved, "rules": {key: ["tensor", 1]}}
        assert partition_of_checkpoint(identity, manifest, config, blocks) == blocks
    identity = {**saved, "rules": {"other": ["tensor", 1]}}
    with pytest.raises(ValueError, match="run lacks it"):
        partition_of_checkpoint(identity, manifest, config, blocks)


def test_patterns_of_another_implementation_count_by_what_they_did(tmp_path: Path) -> None:
    local = replace(BASE, adam_mini={"full_v": ["*.input_layernorm.*"]})
    run_ranks(1, train_and_save, local, str(tmp_path))
    fused = replace(BASE, fused_norms=True)
    (text,) = run_ranks(1, refusal, fused, str(tmp_path))
    assert "layers.0.self_attention.linear_qkv.layer_norm_weight: checkpoint element" in text
    assert f"{BASE.layers} parameters differ" in text
    same = replace(fused, adam_mini={"full_v": ["*.linear_qkv.layer_norm_weight"]})
    ((*_, step, _),) = run_ranks(1, load_and_show, same, str(tmp_path))
    assert step == BASE.steps


# From Megatron's Adam.


def train_adam_and_save(job: Job, folder: str, sharding: str | None) -> Any:
    """Train with Megatron's own Adam; return its state, whole parameter shards by name."""
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    trainer.sync_params()
    save(trainer, folder, sharding)
    return adam_state(trainer), weights_of(trainer)


def adam_state(trainer: Trainer) -> Any:
    """Return param, exp_avg and exp_avg_sq of every slice that stock Adam holds on this rank."""
    names = {param: name for name, param in global_names(trainer.chunks).items()}
    members = trainer.optimizer.chained_optimizers  # dense parameters, and experts if there are any
    return [part for member in members for part in _state_of(trainer, member, names)]


def _state_of(trainer: Trainer, member: Any, names: dict[Any, str]) -> list[Part]:
    from tests.gather import _part

    parts = []
    if trainer.job.distributed_optimizer:
        for param, name in names.items():
            if param not in member.model_param_gbuf_map:
                continue
            begin = member._get_model_param_range_map(param)["param"].start
            state = member._get_main_param_and_optimizer_states(param)
            values = {key: state[key].float() for key in ("param", "exp_avg", "exp_avg_sq")}
            parts.append(_part(trainer, name, param, begin, values))
    else:
        groups = zip(member.float16_groups, member.fp32_from_float16_groups, strict=True)
        for models, mains in groups:
            for param, main in zip(models, mains, strict=True):
                state = member.optimizer.state[main]
                values = {
                    "param": main,
                    "exp_avg": state["exp_avg"],
                    "exp_avg_sq": state["exp_avg_sq"],
                }
                parts.append(_part(trainer, names[param], param, 0, values))
    return parts


ADAM_FORMATS = {
    # one bucket: Megatron writes what it holds
    "fully_reshardable": (replace(BASE, tp=2, pp=2, optimizer="adam", bucket_size=None), 4),
    "dp_reshardable": (replace(BASE, tp=2, pp=2, optimizer="adam"), 8),
    "dp_zero_gather_scatter": (replace(BASE, tp=2, layers=2, optimizer="adam"), 4),
    "plain": (replace(BASE, tp=2, optimizer="adam", distributed_optimizer=False), 2),
}


@pytest.mark.parametrize("layout", ADAM_FORMATS)
def test_adam_checkpoint_gives_its_masters_and_m_and_the_mean_of_v(
    layout: str, tmp_path: Path
) -> None:
    adam_job, world = ADAM_FORMATS[layout]
    sharding = None if layout == "plain" else layout
    adam = run_ranks(world, train_adam_and_save, adam_job, str(tmp_path), sharding)
    targets = [(replace(adam_job, optimizer="adam_mini"), world)]
    if layout in ("dp_reshardable", "dp_zero_gather_scatter"):
        targets.append((targets[0][0], world // 2))  # another data-parallel size, and no other
    else:
        targets.append((replace(adam_job, optimizer="adam_mini", tp=1, pp=1, groups=2), 3))
        targets.append((replace(targets[0][0], adam_mini={"preset": "tensor"}), world))
    for job, ranks in targets:
        loaded = run_ranks(ranks, load_and_show, job, str(tmp_path))
        compare_with_adam(adam, adam_job, loaded, job)
        assert {r[2] for r in loaded} == {adam_job.steps}


def compare_with_adam(adam: list[Any], adam_job: Job, loaded: list[Any], job: Job) -> None:
    """Compare masters and m bit for bit, and v with the mean of Adam's over each block."""
    wanted = {
        key: whole_tensors([r[0] for r in adam], key, adam_job)
        for key in ("param", "exp_avg", "exp_avg_sq")
    }
    for key in ("param", "exp_avg"):
        for name, value in whole_tensors([r[0] for r in loaded], key, job).items():
            assert torch.equal(value, wanted[key][name]), f"{key} {name}"
    for name, value in whole_tensors([r[0] for r in loaded], "v", job).items():
        labels = labels_of(name, tuple(value.shape), job).reshape(-1)
        flat = wanted["exp_avg_sq"][name].double().reshape(-1)
        mean = torch.zeros(int(labels.max()) + 1, dtype=torch.float64)
        mean = mean.index_add(0, labels, flat) / torch.bincount(labels)
        expected = mean[labels].reshape(value.shape)
        assert torch.allclose(value.double(), expected, rtol=1e-6, atol=0.0), f"v {name}"


def test_unsound_adam_checkpoint_is_refused_on_all_ranks(tmp_path: Path) -> None:
    """Megatron's fully_reshardable format is wrong where bucket ends are padded."""
    job = replace(BASE, optimizer="adam")
    run_ranks(3, train_adam_and_save, job, str(tmp_path), "fully_reshardable")
    with pytest.raises(RankError) as caught:
        run_ranks(2, load_and_show, replace(job, optimizer="adam_mini"), str(tmp_path))
    assert len(caught.value.errors) == 2
    for kind, text in caught.value.errors.values():
        assert kind == "ValueError"
        assert "unsound" in text
        assert "--no-load-optim" in text


def writes_sound_reshardable() -> bool:
    from megatron_adam_mini.mcore import compat

    return compat.WRITES_SOUND_RESHARDABLE


def test_megatron_writes_fully_reshardable_state_as_compat_says(tmp_path: Path) -> None:
    """Up to 0.19.2, wrong behind a bucket that is padded at its end: NVIDIA/Megatron-LM#5077.

    Stock Adam on one rank, nothing of this package but the reader of the file.
    """
    (sound,) = run_ranks(1, writes_sound_reshardable)
    job = replace(BASE, optimizer="adam", layers=1, steps=1)
    ranks = run_ranks(1, train_adam_and_save, job, str(tmp_path), "fully_reshardable")
    checkpoint = Checkpoint(tmp_path)
    for key in ("param", "exp_avg", "exp_avg_sq"):
        held = whole_tensors([r[0] for r in ranks], key, job)
        # The buffer begins with the output layer, whose bucket nothing precedes.
        first, last = "output_layer.weight", "embedding.word_embeddings.weight"
        assert torch.equal(checkpoint.read(f"optimizer.state.{key}.{first}"), held[first])
        right = torch.equal(checkpoint.read(f"optimizer.state.{key}.{last}"), held[last])
        assert right == sound, f"{key} of {last}"


# Identity.


def refusal(job: Job, folder: str) -> str:
    with pytest.raises(ValueError, match="partition") as caught:
        load(Trainer(job), folder)
    return str(caught.value)


def load_without_metadata(job: Job, folder: str) -> None:
    from megatron.core import dist_checkpointing

    trainer = Trainer(job)
    state = model_state(trainer, metadata_of(None))
    state["optimizer"] = trainer.optimizer.sharded_state_dict(state, is_loading=True)
    loaded = dist_checkpointing.load(state, folder)
    trainer.optimizer.load_state_dict(loaded["optimizer"])


def test_another_partition_is_refused_in_words_or_converted_when_asked(tmp_path: Path) -> None:
    job = replace(BASE, tp=2)
    saved = run_ranks(2, train_and_save, job, str(tmp_path))
    coarse = replace(job, adam_mini={"value_as_block": True})
    for text in run_ranks(2, refusal, coarse, str(tmp_path)):
        assert "'paper' (manifest" in text
        assert "value as block" in text
        assert "--adam-mini-convert-partition" in text
    with pytest.raises(RankError) as caught:
        run_ranks(2, load_without_metadata, coarse, str(tmp_path))
    assert all("--adam-mini-convert-partition" in t for _, t in caught.value.errors.values())
    fine = replace(job, adam_mini={"full_v": ["*linear_fc1*"], "convert_partition": True})
    for text in run_ranks(2, refusal, fine, str(tmp_path)):
        assert "cannot be converted" in text
        assert "linear_fc1" in text
    asked = replace(job, adam_mini={"preset": "tensor", "convert_partition": True}, tp=1, pp=2)
    loaded = run_ranks(4, load_and_show, asked, str(tmp_path))
    before = whole_tensors([r[0] for r in saved], "v", job)
    for name, value in whole_tensors([r[0] for r in loaded], "v", asked).items():
        mean = averaged(before[name], labels_of(name, tuple(value.shape), asked))
        assert torch.allclose(value.double(), mean, rtol=1e-6, atol=0.0), name


def averaged(value: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean over each label's elements, at each of them, in float64."""
    flat = labels.reshape(-1)
    count = torch.bincount(flat)
    total = torch.zeros(len(count), dtype=torch.float64)
    return (total.index_add(0, flat, value.double().reshape(-1)) / count)[labels]


def test_full_v_can_be_averaged_to_rows_and_rows_to_heads(tmp_path: Path) -> None:
    job = replace(BASE, adam_mini={"preset": "row", "full_v": ["*linear_fc1*"]})
    saved = run_ranks(3, train_and_save, job, str(tmp_path))
    asked = replace(BASE, adam_mini={"convert_partition": True}, tp=2)
    loaded = run_ranks(2, load_and_show, asked, str(tmp_path))
    before = whole_tensors([r[0] for r in saved], "v", job)
    for name, value in whole_tensors([r[0] for r in loaded], "v", asked).items():
        labels = labels_of(name, tuple(value.shape), asked)
        if "linear_fc1" in name or "linear_qkv" in name:
            assert not torch.equal(before[name][1], before[name][2])
        assert torch.allclose(
            value.double(), averaged(before[name], labels), rtol=2e-6, atol=0.0
        ), name


def test_refusal_that_concerns_one_stage_reaches_all_ranks(tmp_path: Path) -> None:
    job = replace(BASE, pp=2)
    run_ranks(2, train_and_save, job, str(tmp_path))
    finer = replace(job, adam_mini={"full_v": ["*layers.0.*"]})
    with pytest.raises(RankError) as caught:
        run_ranks(2, load_and_show, finer, str(tmp_path), timeout=60)
    assert caught.value.errors[0][0] == "ValueError"
    kind, text = caught.value.errors[1]
    assert kind == "RuntimeError"
    assert "rank 0 found ValueError" in text
