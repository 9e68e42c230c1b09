"""The examples: they tokenise without loss, train through the launcher, and report errors."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo
import tokenize_bytes
from evidence.grid import PLANS
from tests.ranks import run_ranks, start_program
from tests.test_resume import launch

RUN_TIMEOUT_S = 150.0
#: Initial weights are small, not zero: the first loss is near to that of a uniform guess.
FIRST_LOSS_TOLERANCE = 0.3
#: Eight steps over a text that repeats itself take more off than that.
LEARNED = 0.5

TINY_MODEL = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --seq-length 32 --max-position-embeddings 32
    --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 1
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 4 --global-batch-size 8 --train-iters 8 --lr 1e-2 --min-lr 1e-2
    --lr-decay-style constant --weight-decay 0.1 --split 90,10,0 --eval-iters 1
    --eval-interval 1000 --seed 3 --log-interval 1 --no-create-attention-mask-in-dataloader
"""


def read_indexed_dataset(prefix: Path) -> list[numpy.ndarray]:
    """Read Megatron's format by its definition, without Megatron; return the documents."""
    index = prefix.with_suffix(".idx").read_bytes()
    magic, version, code, num_sequences, num_documents = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version, code) == (b"MMIDIDX\x00\x00", 1, 8)  # code 8: uint16
    offset = struct.calcsize("<9sQBQQ")
    lengths = numpy.frombuffer(index, numpy.int32, num_sequences, offset)
    offset += 4 * num_sequences
    pointers = numpy.frombuffer(index, numpy.int64, num_sequences, offset)
    offset += 8 * num_sequences
    documents = numpy.frombuffer(index, numpy.int64, num_documents, offset)
    assert documents.tolist() == list(range(num_sequences + 1))  # a sequence for each document
    data = prefix.with_suffix(".bin").read_bytes()
    assert len(data) == 2 * lengths.sum()
    return [
        numpy.frombuffer(data, numpy.uint16, length, pointer)
        for length, pointer in zip(lengths, pointers, strict=True)
    ]


def tokenize(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / "tokenize_bytes.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )


@pytest.fixture(scope="module")
def text_source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder that stands for the standard library, and the files in it that count."""
    folder = tmp_path_factory.mktemp("source")
    contents = {f"module_{i}.py": f"value = {i}\n".encode() * (20 + i) for i in range(60)}
    contents["package/all_bytes.py"] = bytes(range(256)) * 2
    others = {
        "empty.py": b"",
        "notes.txt": b"not source",
        "test/test_a.py": b"assert True",
        "site-packages/b.py": b"import b",
        "package/__pycache__/c.py": b"cached",
    }
    for name, content in (contents | others).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder, contents


@pytest.fixture(scope="module")
def dataset(
    text_source: tuple[Path, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    prefix = tmp_path_factory.mktemp("dataset") / "new folder" / "text"
    result = tokenize("--source", str(text_source[0]), "--output-prefix", str(prefix))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{len(text_source[1])} documents, ")
    return prefix


def test_tokens_are_the_bytes_of_every_file(
    text_source: tuple[Path, dict[str, bytes]], dataset: Path
) -> None:
    documents = read_indexed_dataset(dataset)
    assert all(tokens[-1] == 256 for tokens in documents)
    texts = [tokens[:-1].astype(numpy.uint8).tobytes() for tokens in documents]
    assert all((tokens[:-1] < 256).all() for tokens in documents)
    assert sorted(texts) == sorted(text_source[1].values())


def test_order_is_fixed_and_size_is_bounded(text_source: tuple[Path, dict[str, bytes]]) -> None:
    folder, contents = text_source
    paths = tokenize_bytes.list_documents(folder)
    names = [path.relative_to(folder).as_posix() for path in paths]
    assert set(names) == {*contents, "empty.py"}
    assert names[:3] == ["package/all_bytes.py", "module_5.py", "module_30.py"]  # on every machine
    assert names != sorted(names)

    def sizes(max_bytes: int) -> list[int]:
        return [len(tokens) - 1 for tokens in tokenize_bytes.read_documents(paths, max_bytes)]

    everything = sizes(10**9)
    assert len(everything) == len(contents)
    assert sizes(0) == []
    for max_bytes in (1000, 5000):
        some = sizes(max_bytes)
        assert max_bytes * 0.3 < sum(some) <= max_bytes
        assert some == everything[: len(some)]


def test_nothing_to_tokenize_is_an_error(tmp_path: Path) -> None:
    result = tokenize("--source", str(tmp_path), "--output-prefix", str(tmp_path / "text"))
    assert result.returncode == 2
    assert f"--source {tmp_path} has no *.py file within --max-bytes" in result.stderr


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    [("adam", []), ("adam_mini", ["--tensor-model-parallel-size", "2"])],
)
def test_two_ranks_train_through_the_launcher(
    optimizer: str,
    layout: list[str],
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Adam-mini with torchrun, as the demo runs; Adam in ranks that have all imported already."""
    report = tmp_path / "state.json"
    arguments = [
        *("--cpu-host", str(EXAMPLES / "pretrain_llama.py"), "--optimizer", optimizer),
        *(*TINY_MODEL.split(), *layout),
        *("--data-path", str(dataset), "--data-cache-path", str(tmp_path / "cache")),
        *("--state-report", str(report)),
        *("--tensorboard-dir", str(tmp_path / "events"), "--tensorboard-log-interval", "2"),
    ]
    if optimizer == "adam_mini":
        arguments += ["--adam-mini-log-updates-interval", "4"]
    losses: list[float] = []

    def on_line(line: str) -> None:
        if match := demo._ITERATION.search(line):
            losses.append(float(match[2]))

    log = tmp_path / "log"
    if optimizer == "adam_mini":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        demo.run_command(
            [sys.executable, *torchrun, "-m", "megatron_adam_mini.launch", *arguments],
            log,
            on_line,
            timeout_s=RUN_TIMEOUT_S,
        )
        capsys.readouterr()
    else:
        with start_program(2, launch_with_make, arguments, log=log, folder=ROOT) as run:
            assert run.wait(RUN_TIMEOUT_S) == 0, run.output()
        for line in run.output().splitlines():
            on_line(line)
    assert len(losses) == 8
    assert abs(losses[0] - numpy.log(257)) < FIRST_LOSS_TOLERANCE
    assert losses[-1] < losses[0] - LEARNED
    assert demo._VALIDATION.search(log.read_text()) is not None

    measured = json.loads(report.read_text())
    # Embedding and output; per layer QKV, projection, gate and up, down, two norms; final norm.
    vocabulary = 258 if layout else 257
    num_parameters = 2 * vocabulary * 32 + 2 * (64 * 32 + 32 * 32 + 128 * 32 + 64 * 32 + 64) + 32
    replicated_norms = (5 * 32) if layout else 0  # on both ranks of the tensor-parallel group
    bytes_per_kind = 4 * (num_parameters + replicated_norms)
    for kind in ("main_param", "exp_avg"):
        # Adam-mini's are as long as the bucket's slices, with their padding.
        assert bytes_per_kind <= measured["state_bytes"][kind] < 1.05 * bytes_per_kind
    communication = measured["communication"]
    if optimizer == "adam":
        assert measured["optimizer"] == ["DistributedOptimizer"]
        assert measured["state_bytes"]["exp_avg_sq"] == bytes_per_kind
        assert communication == {"collectives_per_step": 0, "bytes_per_step": 0}
    else:
        assert 0 < measured["state_bytes"]["exp_avg_sq"] < bytes_per_kind / 10
        assert 1 <= communication["collectives_per_step"] <= 2
        assert 0 < communication["bytes_per_step"] < 10_000
    check_logged_metrics(tmp_path / "events", measured if optimizer == "adam_mini" else None)


def launch_with_make(arguments: list[str]) -> None:
    """Run the launcher as on a GPU, where nobody but the script prevents Megatron's ``make``."""
    from megatron.core.datasets import utils

    utils.compile_helpers = utils.compile_helpers.__wrapped__
    launch(arguments)


def make_is_kept(folder: str) -> list[bool]:
    """Return whether Megatron would run ``make``: nothing built; in a source tree; in a wheel."""
    import pretrain_llama

    makefile, datasets, found = Path(folder, "Makefile"), pretrain_llama.datasets, []
    datasets.__file__ = str(makefile.with_name("utils.py"))
    for there, built in ((False, False), (True, True), (False, True)):
        make = datasets.compile_helpers = object()
        makefile.touch() if there else makefile.unlink(missing_ok=True)
        with patch.object(pretrain_llama, "find_spec", lambda _, built=built: built or None):
            pretrain_llama.keep_built_index_builder()
        found.append(datasets.compile_helpers is make)
    return found


def test_only_a_wheel_prevents_make(tmp_path: Path) -> None:
    assert run_ranks(1, make_is_kept, str(tmp_path)) == [[True, True, False]]


def check_logged_metrics(folder: Path, measured: dict[str, Any] | None) -> None:
    """Compare what TensorBoard shows with what the run measured (all ranks together)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("adam-mini/")]
    if measured is None:
        assert names == []
        return
    last = {name: events.Scalars(name)[-1] for name in names}
    assert {event.step for event in last.values()} == {8}
    for kind, total in measured["state_bytes"].items():
        assert 0 < last[f"adam-mini/state-bytes/{kind}"].value <= total
    communication = measured["communication"]
    added = [e.value for n, e in last.items() if n.startswith("adam-mini/added-bytes-per-step/")]
    assert sum(added) == communication["bytes_per_step"]
    collectives = last["adam-mini/added-collectives-per-step"].value
    assert collectives == len(added) == communication["collectives_per_step"]
    ratios = events.Scalars("adam-mini/update-to-weight/mlp")
    assert [event.step for event in ratios] == [4, 8]
    assert all(0 < event.value < 1 for event in ratios)


def test_failure_of_a_run_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = "print('before'); raise ValueError('the cause')"
    with pytest.raises(demo.RunError, match=r"failed with exit code 1; (?s:.*)the cause"):
        demo.run_command([sys.executable, "-c", script], tmp_path / "log")
    assert capsys.readouterr().out.startswith("  $ ")
    assert "before" in (tmp_path / "log").read_text()


def test_run_that_hangs_is_ended_with_its_ranks(tmp_path: Path) -> None:
    """As torchrun's: the ranks are in sessions of their own and end when their parent ends them."""
    script = """
import signal, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
rank = subprocess.Popen(sleep, start_new_session=True)
def end(*_):
    rank.kill()
    rank.wait()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
print(rank.pid, flush=True)
time.sleep(60)
"""
    pids: list[int] = []
    started = time.monotonic()
    with pytest.raises(demo.RunError, match="was not done after 2 s"):
        demo.run_command(
            [sys.executable, "-c", script],
            tmp_path / "log",
            lambda line: pids.append(int(line)),
            timeout_s=2,
        )
    assert time.monotonic() - started < 30
    assert len(pids) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], signal.SIG_DFL)


def test_demo_ends_with_the_error_of_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "EXAMPLES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path / "results")])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert demo.main() == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    errors = capsys.readouterr().err
    assert "demo: the command above failed with exit code 2" in errors
    assert "tokenize_bytes.py" in errors


def test_demo_tables(capsys: pytest.CaptureFixture[str]) -> None:
    def run(title: str, exp_avg_sq: int, collectives: int) -> demo.Run:
        report: dict[str, Any] = {
            "state_bytes": {
                "main_param": 4_000_000,
                "exp_avg": 4_000_000,
                "exp_avg_sq": exp_avg_sq,
            },
            "communication": {"collectives_per_step": collectives, "bytes_per_step": 1536},
        }
        return demo.Run(title, [1, 2, 4], [5.5, 4.0, 2.5], 2.75, report)

    demo.print_state(run("Adam", 4_000_000, 0), run("Adam-mini", 20_000, 2))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["8,000.0", "kB", "4,020.0", "kB"] in [row[-4:] for row in rows]
    assert ["added", "collectives", "per", "step", "0", "2"] in rows


def test_demo_compares_several_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real program and its progress; only the plan is a toy."""
    toy = replace(PLANS["toy"].settings[0], rates=(1e-2,))
    plan = replace(PLANS["demo"], settings=(toy,), seeds=(0, 1))
    monkeypatch.setitem(PLANS, "demo", plan)
    words = [sys.executable, "-c", ""]

    def run_toy(command: list[str], log: Path, on_line: Any) -> None:
        assert command[1:5] == ["-m", "evidence", "--plan", "demo"]
        words[2] = (
            "import sys; from dataclasses import replace; from evidence import __main__, grid; "
            f"grid.PLANS['demo'] = {plan!r}; sys.exit(__main__.main())"
        )
        words[2] = words[2].replace("Plan(", "grid.Plan(").replace("Setting(", "grid.Setting(")
        original([*words, *command[3:], "--workers", "1"], log, on_line)

    original = demo.run_command
    monkeypatch.setattr(demo, "run_command", run_toy)
    compared = demo.compare(tmp_path)
    shown = capsys.readouterr().out
    assert [entry.optimizer for entry in compared] == ["adamw", "row"]
    assert all(f"seed {seed}: validation loss" in shown for seed in (0, 1))
    demo.print_losses(compared)
    gap = compared[1].losses[0] - compared[0].losses[0] + compared[1].losses[1]
    assert f"{(gap - compared[0].losses[1]) / 2:+.3f}, 95 %" in capsys.readouterr().out
    assert (tmp_path / "comparison-curves.png").read_bytes().startswith(b"\x89PNG")


def test_megatron_log_lines_are_understood() -> None:
    line = (
        " [2026-01-02 03:04:05.678901] iteration       20/     120 | consumed samples:     320 "
        "| elapsed time per iteration (ms): 543.1 | learning rate: 2.9E-03 | global batch size: 9 "
        "| lm loss: 2.966246E+00 | loss scale: 1.0 | grad norm: 0.655 |"
    )
    match = demo._ITERATION.search(line)
    assert match is not None
    assert (int(match[1]), float(match[2])) == (20, 2.966246)
    line = "validation loss at iteration 120 on validation set | lm loss value: 2.2E+00 | lm loss"
    match = demo._VALIDATION.search(line)
    assert match is not None
    assert float(match[1]) == 2.2
