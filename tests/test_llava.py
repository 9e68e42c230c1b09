"""LLaVA: a vision model, a projector and a language model, each with heads and widths of its own.

Megatron-Core 0.19.2 puts the vision model and the projector on the first pipeline stage, beside the
first layers of the language model.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adam_mini import cli
from megatron_adam_mini.checkpoint.errors import UnreadableError
from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.convert.blocks import blocks_of
from megatron_adam_mini.convert.parameters import fold
from tests.gather import whole_tensors
from tests.megatron_job import Job, whole_weight
from tests.ranks import run_ranks
from tests.test_checkpoint import compare, load_and_show, train_and_save
from tests.test_oracle import compare_runs, sharded_run, unsharded_run

ROW = "LLaVA: vision model, projector, language model"
LLAVA = Job(
    family="llava", hidden=32, heads=4, groups=2, ffn=48, vocab=64, tied=True, overlap=True,
    bucket_size=2000, steps=4, batch=16,
)  # fmt: skip
#: As LLaVA starts: between a vision and a language model that are trained already.
PROJECTOR = replace(LLAVA, tied=False, frozen=("vision_model", "language_model"), bucket_size=None)
LAYOUTS = {"tp1": LLAVA, "tp2": replace(LLAVA, tp=2), "pp2": replace(LLAVA, pp=2)}


@pytest.fixture(scope="module")
def expected() -> Any:
    """Train with the oracle, once."""
    return run_ranks(1, unsharded_run, replace(LLAVA, overlap=False, bucket_size=None))[0]


@pytest.mark.support(ROW, "oracle")
@pytest.mark.parametrize(("layout", "dp"), [("tp1", 1), ("tp1", 2), ("tp2", 2), ("pp2", 2)])
def test_sharded_run_equals_unsharded_oracle(layout: str, dp: int, expected: Any) -> None:
    job = LAYOUTS[layout]
    ranks = run_ranks(dp * job.tp * job.pp, sharded_run, job)
    compare_runs(job, ranks, expected)
    parts = [{name.partition(".")[0] for name in rank["names"]} for rank in ranks]
    first, last = set.union(*parts[:dp]), set.union(*parts[-dp:])
    assert first == {"vision_model", "vision_projection", "language_model"}
    assert last == (first if job.pp == 1 else {"language_model"})


@pytest.mark.support(ROW, "oracle")
def test_a_projector_trains_between_frozen_models() -> None:
    job = replace(PROJECTOR, tp=2, pp=2)
    ranks = run_ranks(4, sharded_run, job)
    compare_runs(job, ranks, run_ranks(1, unsharded_run, PROJECTOR)[0])
    held = {name for rank in ranks for name in rank["names"]}
    assert held == {
        f"vision_projection.encoder.linear_fc{number}.{kind}"
        for number in "12"
        for kind in ("weight", "bias")
    }


@pytest.mark.support(ROW, "overlap")
def test_overlap_changes_no_bit() -> None:
    job = replace(LLAVA, tp=2, bucket_size=None, steps=2)
    with_overlap, without = (
        [rank["final"] for rank in run_ranks(4, sharded_run, replace(job, overlap=overlap))]
        for overlap in (True, False)
    )
    for key in ("param", "exp_avg", "v"):
        found = whole_tensors(with_overlap, key, job)
        for name, value in whole_tensors(without, key, job).items():
            assert torch.equal(found[name], value), f"{key} {name}"


@pytest.mark.support(ROW, "reshard")
def test_checkpoints_reshard(tmp_path: Path, capsys: Any) -> None:
    # Tied embeddings on two stages, and on one. Without overlap, no gather of weights is
    # outstanding at the time of the save, so that they can be verified.
    saved_job = replace(LLAVA, tp=2, pp=2, bf16=True, steps=1, overlap=False, bucket_size=None)
    saved = run_ranks(4, train_and_save, saved_job, str(tmp_path))
    job = replace(saved_job, tp=1, pp=1, overlap=True, bucket_size=2000)
    compare(saved, saved_job, run_ranks(2, load_and_show, job, str(tmp_path)), job)
    capsys.readouterr()
    assert cli.main(["verify", "--json", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []  # heads were checked, too
    heads = Checkpoint(tmp_path).optimizer["adam_mini"]["heads"]
    assert {(h["num_heads"], h["num_query_groups"], h["head_dim"]) for h in heads.values()} == {
        (4, 4, 6),
        (4, 2, 8),
    }


@pytest.mark.support(ROW, "reshard")
def test_all_weights_train_after_the_projector(tmp_path: Path) -> None:
    """LLaVA's second stage of training, under another layout, from a checkpoint of the first."""
    saved_job = replace(PROJECTOR, tp=2, pp=2, bf16=True, steps=2)
    saved = run_ranks(4, train_and_save, saved_job, str(tmp_path))
    job = replace(LLAVA, tied=False, bf16=True, frozen=("vision_model",))
    loaded = run_ranks(2, load_and_show, job, str(tmp_path))
    for key in ("param", "exp_avg", "v"):
        before = whole_tensors([rank[0] for rank in saved], key, saved_job)
        after = whole_tensors([rank[0] for rank in loaded], key, job)
        assert {name.partition(".")[0] for name in before} == {"vision_projection"}
        assert {name.partition(".")[0] for name in after.keys() - before} == {"language_model"}
        for name, value in after.items():
            expected = torch.zeros_like(value)
            if key == "param":  # the rounded weights that the checkpoint has
                expected = whole_weight(name, tuple(value.shape)).bfloat16().float()
            assert torch.equal(value, before.get(name, expected)), f"{key} {name}"


def test_args_do_not_tell_the_heads_of_a_vision_model() -> None:
    args = argparse.Namespace(num_attention_heads=4, num_query_groups=2, kv_channels=8)
    args.group_query_attention, args.transformer_impl = True, "local"
    (language, vision) = (
        next(fold(f"{part}.decoder.layers.self_attention.linear_qkv.weight", (1, rows, 32)))
        for part, rows in (("language_model", 64), ("vision_model", 64))
    )
    blocks = blocks_of([language], args, AdamMiniConfig())
    assert [found.num_blocks for found in blocks.values()] == [4 + 2 + 2 * 8]
    with pytest.raises(UnreadableError, match="not those of 'vision_model"):
        blocks_of([vision], args, AdamMiniConfig())
