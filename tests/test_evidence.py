"""The programs of ``evidence/``: what they train, compare and report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evidence import __main__ as command
from evidence import comparison, corpora, grid, run_log, sweep, training, twin
from evidence.comparison import paired_gap
from evidence.grid import PLANS, pending
from evidence.model import Llama
from evidence.settings import SIZES, STORAGES, Run
from megatron_adam_mini import AdamMini
from tests.ranks import start_program
from tests.test_resume import launch

ROOT = Path(__file__).resolve().parent.parent

TOY = PLANS["toy"]


def fake(loss: float, run: Run) -> dict[str, Any]:
    return {"validation": {str(run.steps): loss}, "second_moments": 1, "training": [loss]}


def train_with_few_samples(run: Run) -> dict[str, Any]:
    """Do a run, validated on an eighth of the samples: on all takes a third of a toy's time."""
    training.VALIDATION_SAMPLES = 32
    return training.train(run)


def test_the_whole_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train a toy plan in other processes, report, and find nothing to do the second time."""
    log, report = tmp_path / "toy.jsonl", tmp_path / "toy.md"
    words = ["evidence", "--plan", "toy", "--log", str(log), "--workers", "1"]
    monkeypatch.setitem(sweep._TRAINERS, "torch", train_with_few_samples)
    monkeypatch.setattr("sys.argv", [*words, "--minutes", "0"])
    assert command.main() == 3
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", words)
    assert command.main() == 0
    lines = log.read_text().splitlines()
    assert not pending(TOY, run_log.read(log))
    assert {json.loads(line)["run"]["optimizer"] for line in lines} == set(TOY.optimizers)
    text = report.read_text()
    for title in ("In short", "Each at its best rate", "All at AdamW's best rate", "Stability"):
        assert f"## {title}" in text
    assert "Value as one block" in text
    assert "| toy, 8 steps | 0.01 | bf16 m, stochastic |" in text
    assert text.count("the same bits") == 3
    assert "DIFFERENT" not in text
    assert "not complete" not in text
    for name in ("curves", "gaps", "rates", "stability"):
        assert (tmp_path / f"toy-{name}.png").stat().st_size > 10_000
        assert f"(toy-{name}.png)" in text

    monkeypatch.setattr(training, "train", None)  # in vain: nothing is left
    assert command.main() == 0
    assert log.read_text().splitlines() == lines


def test_a_log_resumes_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    run = TOY.run(TOY.settings[0], "row", 1e-3, 0)
    path = tmp_path / "log.jsonl"
    run_log.RunLog(path).append(run, fake(2.0, run))
    with path.open("a") as file:
        file.write('{"run": {"opti')
    log = run_log.RunLog(path)
    assert list(log.results) == [run]
    other = replace(run, rules=(("*", "row"),))
    log.append(other, fake(3.0, other))
    with pytest.raises(RuntimeError, match=r"Another sweep writes to .*; wait for it"):
        run_log.RunLog(path)
    assert list(run_log.read(path)) == [run, other]


def test_all_have_the_same_trials_and_seeds_at_their_best_rate() -> None:
    plan = replace(TOY, map=None, ablation=None, storage=(), settings=TOY.settings[:1])
    setting = plan.settings[0]
    best = {"adamw": 1e-3, "paper": 1e-2}
    results: dict[Run, dict[str, Any]] = {}
    for _ in range(3):
        for run in pending(plan, results):
            results[run] = fake(2.0 + (run.lr != best.get(run.optimizer, 1e-2)) + run.seed, run)
    for name in plan.optimizers:
        runs = [run for run in results if run.optimizer == name]
        assert [run.lr for run in runs if run.seed == 0] == list(setting.rates)
        at_others = [run.lr for run in runs if run.seed == 1]
        assert at_others == list(dict.fromkeys((best.get(name, 1e-2), best["adamw"])))
    found = {entry.optimizer: entry for entry in comparison.tuned(plan, setting, results)}
    assert found["paper"].losses == (2.0, 3.0)
    assert found["paper"].lr == 1e-2
    equal = {entry.optimizer: entry for entry in comparison.at_equal_rate(plan, setting, results)}
    assert equal["paper"].gap is not None
    assert equal["paper"].gap.values == (1.0, 1.0)


def test_a_gap_is_paired_and_its_interval_is_students() -> None:
    gap = paired_gap((2.0, 5.1, 1.2), (1.9, 5.0, 1.0))
    assert gap.mean == pytest.approx(0.4 / 3)
    # t of 2 degrees of freedom has the closed form p = 1/2 + t / (2 sqrt(2 + t^2)).
    t = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    deviation = math.sqrt(2 * (0.1 - 0.4 / 3) ** 2 + (0.2 - 0.4 / 3) ** 2) / math.sqrt(2)
    assert gap.half_width == pytest.approx(t * deviation / math.sqrt(3), rel=1e-3)
    assert gap.verdict == "not told apart"
    assert paired_gap((2.0, 3.01), (1.0, 2.0)).verdict == "worse"
    assert paired_gap((1.0, 2.0), (2.0, 3.01)).verdict == "better"
    assert paired_gap((2.0,), (1.0,)).verdict == "not told apart"
    assert paired_gap((math.inf, 3.0), (1.0, 2.0)).verdict == "diverged"


@pytest.mark.parametrize("optimizer", TOY.optimizers)
def test_a_run_is_of_its_optimizer(optimizer: str) -> None:
    run = TOY.run(TOY.settings[0], optimizer, 1e-2, 0)
    made = training.make_optimizer(run, training.initial_model(SIZES["toy"], 0))
    assert isinstance(made, torch.optim.AdamW if optimizer == "adamw" else AdamMini)
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]
    if isinstance(made, AdamMini):
        rules = {entry["name"]: entry["rule"] for entry in made.manifest()}
        assert (rules["layers.0.self_attn.q_proj.weight"] == "row") == (optimizer != "paper")
        assert rules["lm_head.weight"] == "row"
    first, second = training.train(run), training.train(run)
    assert first["validation"] == second["validation"]
    assert not first["diverged"]
    assert first["validation"]["8"] < first["validation"]["2"]


def test_adamw_of_equal_seed_is_another_run_of_the_same_batches() -> None:
    """With one v per element, Adam-mini is AdamW, so all the rest of a run must be the same."""
    run = TOY.run(TOY.settings[1], "adamw", 1e-2, 0)
    element = replace(run, optimizer="paper", rules=(("*", "element"),))
    adamw, mini = (training.train(one)["validation"]["16"] for one in (run, element))
    assert adamw == pytest.approx(mini, abs=1e-4)
    assert abs(training.train(replace(element, rules=()))["validation"]["16"] - adamw) > 1e-3


def test_megatron_trains_the_same_run(tmp_path: Path) -> None:
    """Weights, batches, schedule and losses through the launcher, up to rounding."""
    run = replace(TOY.run(TOY.settings[0], "row", 1e-2, 0), trainer="megatron")
    with start_program(1, launch, twin.flags(run), log=tmp_path / "log", folder=ROOT) as program:
        assert program.wait(150) == 0, program.output()
    found = twin.parse(program.output(), run)
    plain = training.train(replace(run, trainer="torch"))
    assert found["validation"] == pytest.approx(plain["validation"], abs=1e-4)
    # Megatron's second logged loss is the mean of two.
    assert len(found["training"]) == len(plain["training"]) == 8
    assert found["training"][2:] == pytest.approx(plain["training"][2:], abs=2e-4)
    results = {run: found, replace(run, trainer="torch"): plain}
    plan = replace(TOY, twin=grid.Twin("toy", 8, 1e-2, ("row",)))
    (pair,) = comparison.twin_runs(plan, results)
    assert pair.torch == pytest.approx(pair.megatron, abs=1e-4)
    assert not pending(replace(plan, settings=(), map=None, ablation=None, storage=()), results)


def test_state_in_fewer_bits_is_that_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With float32 state, the run of plain weights up to their rounding; each way is its own."""
    monkeypatch.setattr(training, "VALIDATION_SAMPLES", 32)
    run = TOY.storage[0].run(TOY, "float32", 0)
    found = {way: training.train(replace(run, storage=way)) for way in ("", *STORAGES)}
    plain, first = found.pop(""), found["float32"]
    assert first["second_moments"] == plain["second_moments"]
    assert first["validation"]["8"] == pytest.approx(plain["validation"]["8"], abs=0.05)
    assert len({result["state"] for result in found.values()}) == len(found) - 3
    assert found["remainders"]["state"] == first["state"]
    assert found["fp8 m, remainders"]["state"] == found["fp8 m"]["state"]
    assert found["lean"]["state"] == found["bf16 m, stochastic"]["state"]
    assert first["norms"]["weights"][-1] == pytest.approx(
        found["float32, nudged"]["norms"]["weights"][-1], rel=1e-3
    )


def test_storages_are_compared_with_float32_seed_by_seed() -> None:
    test = replace(TOY.storage[0], ways=("float32", "bf16 m, nearest"))
    losses = {("float32", 0): 2.0, ("float32", 1): 3.0}
    losses |= {("bf16 m, nearest", 0): 2.1, ("bf16 m, nearest", 1): 3.3}
    results = {
        test.run(TOY, way, seed): fake(loss, test.run(TOY, way, seed))
        | {"state": way, "norms": {"m": [1.0, loss, loss, loss]}}
        for (way, seed), loss in losses.items()
    }
    base, other = comparison.stored(TOY, test, results)
    assert base.gap is None
    assert base.same_bits
    assert other.gap is not None
    assert other.gap.values == pytest.approx((0.1, 0.3))
    assert other.norms["m"] == pytest.approx([1.0, *[(2.1 / 2 + 3.3 / 3) / 2] * 3])
    assert not other.same_bits
    del results[test.run(TOY, "bf16 m, nearest", 1)]
    assert [entry.way for entry in comparison.stored(TOY, test, results)] == ["float32"]


def test_validation_files_are_not_trained_on() -> None:
    corpus = corpora.read("source")
    assert 0.01 < len(corpus.validation) / len(corpus.training) < 0.1
    first = int((corpus.validation == corpora.END_OF_DOCUMENT).nonzero()[0])
    compile(bytes(corpus.validation[:first].to(torch.uint8)), "a whole file", "exec")
    with pytest.raises(ValueError, match=r"no corpus 'nothing'; give source, docstrings, or the"):
        corpora.read("nothing")


def test_docstrings_are_a_text() -> None:
    source = b'"""Of a module."""\nclass A:\n    """Of\n    A."""\n    def b():\n        "of b"\n'
    assert corpora._docstrings(source) == b"Of a module.\n\nOf\nA.\n\nof b"
    assert corpora._docstrings(b"print 1") == b""


def test_tokens_of_a_file_are_a_corpus(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "tokens.npy", np.arange(1000, dtype=np.uint16))
    corpus = corpora.read(str(tmp_path / "tokens.npy"))
    assert corpus.training.tolist() == list(range(950))
    assert corpus.validation.tolist() == list(range(950, 1000))


def test_rates_are_megatrons() -> None:
    run = replace(TOY.run(TOY.settings[0], "adamw", 1.0, 0), steps=10, warmup=2)
    assert [training.rate(run, step) for step in (0, 1, 2, 6, 9)] == [0, 0.5, 1, 0.5, 0.125]
    assert training.rate(replace(run, warmup=0), 0) == 1


@pytest.mark.parametrize("name", ["39M", "67M"])
def test_sizes_of_the_paper(name: str) -> None:
    with torch.device("meta"):
        model = Llama(SIZES[name])
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert parameters == pytest.approx(float(name[:-1]), abs=1)
    made = training.make_optimizer(
        Run(optimizer="row", size=name, lr=1e-3, warmup=1, steps=1, seed=0), model
    )  # names are known
    assert isinstance(made, AdamMini)
    assert "element" not in {entry["rule"] for entry in made.manifest()}


def test_flags_choose_parts_of_a_plan() -> None:
    def of(*words: str) -> grid.Plan:
        return command.plan_of(command.parser().parse_args(words))

    assert of() == PLANS["cpu"]
    plan = of("--plan", "paper", "--sizes", "39M", "--device", "cuda", "--corpus", "c4.npy")
    (setting,) = plan.settings
    assert (setting.size, setting.corpus, plan.device) == ("39M", "c4.npy", "cuda")
    assert plan.run(setting, "row", 1e-3, 0).warmup == 78  # 1 % as in the paper
    only = of("--stages", "map", "--optimizers", "adamw", "row")
    assert (only.settings, only.ablation, only.optimizers) == ((), None, ("adamw", "row"))
    with pytest.raises(ValueError, match=r"--plan cpu has sizes 0.04M, 0.13M, 0.38M, 0.85M; give"):
        of("--sizes", "7B")
