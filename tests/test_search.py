"""``megatron-adam-mini memory --gpu-memory``: which layouts are listed, and what fits."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_adam_mini import cli
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.estimate.memory import FORMATS
from megatron_adam_mini.estimate.models import MODELS, Model
from megatron_adam_mini.estimate.parallel import Cluster, Parallel, flag
from megatron_adam_mini.estimate.search import Candidate, layouts, search
from megatron_adam_mini.mcore import activations
from tests.ranks import run_ranks
from tests.test_memory import megatrons_flags

ROOT = Path(__file__).resolve().parent.parent
GB = 10**9
SEARCH = "--gpu-memory 80 --world-size 16 --seq-length 4096 --global-batch-size 256"
SMALL = Model(
    num_layers=6,
    hidden_size=48,
    num_attention_heads=6,
    ffn_hidden_size=96,
    padded_vocab_size=384,
    position_embedding_type="rope",
    num_experts=6,
    moe_ffn_hidden_size=48,
)
#: Megatron's estimate counts in float and rounds at other places.
ESTIMATE_TOLERANCE = 1e-6
#: Megatron's own number of weights and state has no padding and an even split of the stages.
STATE_TOLERANCE = 0.01


def cluster(**changes: int) -> Cluster:
    values = {"gpu_memory": 80 * GB, "world_size": 12, "gpus_per_node": 8}
    values |= {"seq_length": 4096, "global_batch_size": 12}
    return Cluster(**{**values, **changes})


@pytest.fixture
def no_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate() -> Any:
        raise ImportError("no Megatron")

    monkeypatch.setattr(activations, "activation_estimate", estimate)


@pytest.fixture
def one_gb_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate of 10 GB per sequence of a micro-batch."""

    def estimate(arguments: Mapping[str, Any]) -> int:
        return 10 * GB * int(arguments["micro_batch_size"])

    monkeypatch.setattr(activations, "activation_estimate", lambda: estimate)


def run_cli(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert cli.main(["memory", *flags, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def sizes(parallel: Parallel) -> tuple[int, ...]:
    return (
        parallel.tp,
        parallel.pp,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.data_parallel_size,
    )


@pytest.mark.support("search of layouts that fit a GPU's memory", "test")
@pytest.mark.usefixtures("no_megatron")
def test_bytes_are_those_of_the_plan_of_one_layout(capsys: pytest.CaptureFixture[str]) -> None:
    """Of that plan, real runs prove every byte; see ``test_memory``."""
    model = ["--model", "mixtral-8x7b-like", "--num-layers", "5", "--hidden-size", "256"]
    model += ["--num-attention-heads", "8", "--ffn-hidden-size", "512", "--overlap-grad-reduce"]
    found = run_cli(capsys, *model, *SEARCH.split())["layouts"]
    assert len(found) > 20
    checked = 0
    for entry in found[:: len(found) // 8]:
        flags = list(model)
        for name in ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor"):
            value = entry["layout"][f"{name}_parallel_size"]
            flags += [flag(f"{name}_parallel_size"), str(value)]
        last = entry["layout"]["decoder_last_pipeline_num_layers"]
        flags += ["--decoder-last-pipeline-num-layers", str(last)] if last else []
        plan = run_cli(capsys, *flags, "--world-size", "16")["optimizers"]
        for form in FORMATS:
            assert entry["bytes"][form] == plan[form]["largest_rank"]["total"]
            checked += 1
    assert checked >= 8 * len(FORMATS)


def test_layouts_that_megatron_refuses_are_not_listed() -> None:
    """Six heads, layers and experts on 12 GPUs: what divides them, spelled out by hand."""
    found = [sizes(parallel) for parallel in layouts(SMALL, cluster(), {})]
    assert len(found) == len(set(found))
    assert {tp for tp, *_ in found} == {1, 2}  # not 4 or 8: six heads
    # 4 stages have 2, 2, 2 and no layer; 6 have one each.
    assert {pp for _, pp, *_ in found} == {1, 2, 3, 6}
    assert {ep for *_, ep, _ in found} == {1, 2, 3, 6}
    for tp, pp, cp, ep, dp in found:
        assert tp * pp * cp * dp == 12
        assert (tp * cp * dp) % ep == 0
    assert (2, 3, 1, 2, 2) in found
    assert (1, 6, 1, 3, 2) not in found  # 2 ranks of a stage cannot hold 3 shares of the experts


def test_layers_that_do_not_divide_leave_the_rest_to_the_last_stage() -> None:
    model = MODELS["deepseek-v3-like"]
    size = cluster(world_size=1024, global_batch_size=1024)
    fixed = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 64}
    found = {p.pp: p.decoder_last_pipeline_num_layers for p in layouts(model, size, fixed)}
    # 61 layers; two in each of 32 stages would leave less than none.
    assert found == {1: None, 2: 30, 4: 13, 8: 5, 16: 1}


def test_sizes_that_are_given_stay() -> None:
    fixed = {"pipeline_model_parallel_size": 3, "grad_reduce_in_bf16": True}
    found = list(layouts(SMALL, cluster(), fixed))
    assert found
    assert all(parallel.pp == 3 and parallel.grad_reduce_in_bf16 for parallel in found)


def test_batch_and_sequence_limit_the_layouts() -> None:
    few = [sizes(p) for p in layouts(SMALL, cluster(global_batch_size=2), {})]
    assert {dp for *_, dp in few} <= {1, 2}
    long = [sizes(p) for p in layouts(SMALL, cluster(seq_length=16384, world_size=4), {})]
    assert {cp for _, _, cp, _, _ in long} == {1, 2, 4}
    with pytest.raises(ValueError, match=r"No layout of 7 GPUs is possible; the last was refused"):
        list(layouts(SMALL, cluster(world_size=7), {}))


def test_fewest_model_parallel_ranks_come_first() -> None:
    found = search(SMALL, cluster(), AdamMiniConfig())
    ranks = [candidate.model_ranks for candidate in found]
    assert ranks == sorted(ranks)
    assert ranks[0] == 1


def test_what_fits_with_a_micro_batch() -> None:
    totals = {"adam": 65, "adam_mini": 55, "adam_mini_remainders_bf16_m": 35}
    candidate = Candidate(Parallel(), totals, {1: 20, 2: 40, 4: 80})
    largest = {name: candidate.largest_micro_batch(name, 80) for name in totals}
    assert largest == {"adam": None, "adam_mini": 1, "adam_mini_remainders_bf16_m": 2}
    assert [candidate.fits(name, 80) for name in totals] == [False, True, True]
    alone = Candidate(Parallel(), totals, {})
    assert [alone.fits(name, 60) for name in totals] == [False, True, True]


@pytest.mark.usefixtures("one_gb_each")
def test_table_marks_what_fits_only_with_adam_mini(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "mixtral-8x7b-like", *SEARCH.split()]
    report = run_cli(capsys, *flags)
    assert cli.main(["memory", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line[2:].split() and line[2:].split()[0].isdigit()]
    rows = [line for line in rows if line.startswith(("* ", "  "))]
    shown = [e for e in report["layouts"] if set(report["shown"]) & set(e["fits"])]
    assert 0 < sum(line.startswith("*") for line in rows) < len(rows) <= 30
    assert f"{len(report['layouts'])} are possible, {len(shown)} fit" in lines[1]
    for line, entry in zip(rows, shown, strict=False):
        assert line.startswith("*") == ("adam" not in entry["fits"])
    for entry in report["layouts"]:
        for name, size in entry["largest_micro_batch"].items():
            free = 80 * GB - entry["bytes"][name]
            assert (size or 0) * 10 * GB <= free or size is None
            assert (size is None) == (free < 10 * GB)


@pytest.mark.usefixtures("no_megatron")
def test_without_megatron_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--model", "mixtral-8x7b-like", *SEARCH.split()]) == 0
    text = capsys.readouterr().out
    assert "Not counted either: activations" in text
    assert "pip install megatron-core" in text
    assert "micro-batch" not in text
    assert re.search(r" \(\d+\.\d\d\) ", text)  # a number that does not fit


@pytest.mark.usefixtures("no_megatron")
def test_fp8_weights_leave_no_remainders(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "llama-3-8b", *SEARCH.split(), "--fp8-param-gather"]
    report = run_cli(capsys, *flags)
    assert list(report["shown"]) == ["adam", "adam_mini", "adam_mini_bf16_m"]
    assert not [name for entry in report["layouts"] for name in entry["bytes"] if "rem" in name]
    assert cli.main(["memory", *flags]) == 0
    assert "16 bit: Adam-mini, bf16 m." in capsys.readouterr().out
    assert cli.main(["memory", *flags, "--optimizer-cpu-offload"]) == 2
    assert "does not support --optimizer-cpu-offload with" in capsys.readouterr().err


@pytest.mark.usefixtures("one_gb_each")
def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layouts.png"
    flags = ["memory", "--model", "llama-3-8b", *SEARCH.split(), "--plot", str(path)]
    assert cli.main(flags) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()


@pytest.mark.usefixtures("one_gb_each")
def test_picture_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "layouts.png"
    assert cli.main(["memory", "--model", "llama-3-8b", *SEARCH.split(), "--plot", str(path)]) == 2
    assert "pip install 'megatron-adam-mini[plot]'" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.usefixtures("no_megatron")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu-memory 80 --world-size 8", "give --seq-length, --global-batch-size"),
        (
            "--gpu-memory 80 --data-parallel-size 8 --seq-length 8 --global-batch-size 8",
            "give --world-size",
        ),
        ("--seq-length 4096", "--seq-length belong to a search; add --gpu-memory GB"),
        ("--plot layouts.png", "--plot belong to a search"),
        (f"{SEARCH} --every-rank --json", "--every-rank is for one layout"),
        (f"{SEARCH} --gpus-per-node 0", "--gpus-per-node=0 is not allowed"),
        (f"{SEARCH} --tensor-model-parallel-size 3", "No layout of 16 GPUs is possible"),
        ("--gpu-memory 1 --world-size 1 --seq-length 8 --global-batch-size 8 --plot a.png", "draw"),
    ],
)
def test_wrong_flags(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--model", "llama-3-8b", *flags.split()]) == 2
    assert message in capsys.readouterr().err


# Megatron's own words on the same layouts: its parser, its validation and its estimate.


def megatrons_view(commands: list[tuple[list[str], int]]) -> list[dict[str, float]]:
    """Return Megatron's estimates in bytes for each command line; fails where one is refused."""
    import contextlib
    import io
    import os

    from megatron.training import arguments
    from megatron.training.theoretical_memory_usage import report_theoretical_memory

    from megatron_adam_mini.cpu_host import with_cpu_flags

    found = []
    for flags, world_size in commands:
        os.environ.update(WORLD_SIZE=str(world_size), RANK="0")
        sys.argv = ["pretrain_gpt.py", *with_cpu_flags(flags)]
        with contextlib.redirect_stdout(io.StringIO()):
            args = arguments.parse_args()
            arguments.validate_args(args)
            arguments.core_transformer_config_from_args(args)
            batches = args.global_batch_size // args.micro_batch_size // args.data_parallel_size
            state, activation, _ = report_theoretical_memory(args, num_microbatches=batches)
        found.append({"state": state * 2**20, "activations": activation * 2**20})
    return found


def megatrons_estimates(arguments: list[Mapping[str, Any]]) -> list[int]:
    estimate = activations.activation_estimate()
    return [estimate(values) for values in arguments]


@pytest.mark.support("search of layouts that fit a GPU's memory", "test")
@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b-like"])
def test_megatron_takes_every_layout_and_estimates_the_same(name: str) -> None:
    model = replace(MODELS[name], vocab_size=None, padded_vocab_size=131072)
    if model.num_experts is None:
        size = cluster(world_size=16, global_batch_size=64, seq_length=8192)
    else:
        size = cluster(world_size=8, global_batch_size=64)
    given: list[dict[str, Any]] = []

    def remember(values: Mapping[str, Any]) -> int:
        given.append(dict(values))
        return 0

    found = search(model, size, AdamMiniConfig(), activations=remember)
    first = [values for values in given if values["micro_batch_size"] == 1]
    assert len(first) == len(found) > 15
    commands = []
    for candidate in found:
        flags = megatrons_flags(model, candidate.parallel)
        flags += ["--seq-length", str(size.seq_length), "--max-position-embeddings", "8192"]
        flags += ["--micro-batch-size", "1", "--global-batch-size", "64", "--lr", "1e-4"]
        flags += ["--train-iters", "1", "--bf16", "--use-distributed-optimizer"]
        flags += ["--recompute-granularity", "selective"]
        flags += ["--sequence-parallel"] if candidate.parallel.tp > 1 else []
        commands.append((flags, size.world_size))
    (theirs,) = run_ranks(1, megatrons_view, commands)
    (ours,) = run_ranks(1, megatrons_estimates, first)
    estimates = {
        (v["tensor_model_parallel_size"], v["pipeline_model_parallel_size"], v["seq_length"]): n
        for v, n in zip(first, ours, strict=True)
    }
    for candidate, view in zip(found, theirs, strict=True):
        parallel = candidate.parallel
        tokens = size.seq_length // parallel.context_parallel_size
        estimate = estimates[parallel.tp, parallel.pp, tokens]
        plain = parallel.context_parallel_size == 1 and model.num_experts is None
        if plain and parallel.tp > 1:  # Megatron has another formula without sequence parallelism
            assert estimate == pytest.approx(view["activations"], rel=ESTIMATE_TOLERANCE)
        if plain and parallel.pp == 1:
            assert candidate.totals["adam"] == pytest.approx(view["state"], rel=STATE_TOLERANCE)


def printed(arguments: list[str]) -> str:
    """Return what the command prints where Megatron is there."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(arguments) == 0
    return out.getvalue()


def test_documented_search_is_the_real_one() -> None:
    text = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```console\n\$ (.*--gpu-memory(?:.*\\\n)*.*)\n((?:.*\n)*?)```", text)
    program, *arguments = block[0].replace("\\\n", "").split()
    assert program == "megatron-adam-mini"
    at = arguments.index("--plot")
    picture = ROOT / arguments[at + 1]
    assert f"({picture.name})" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    (output,) = run_ranks(1, printed, arguments[:at] + arguments[at + 2 :])
    assert output == block[1]
