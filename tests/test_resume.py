"""Real runs that are killed or whose disk is full go on, bit for bit as if nothing happened.

Ranks run the launcher as ``torchrun`` starts it, but have imported all that they need (see
``ranks``); ``test_examples`` starts a run with ``torchrun`` itself.
"""

from __future__ import annotations

import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adam_mini import cli
from megatron_adam_mini.checkpoint.reader import Checkpoint
from tests.ranks import Program, run_ranks, start_program

ROOT = Path(__file__).resolve().parent.parent
# No dropout: on the CPU host, Megatron's CUDA generator is the CPU's, from which a data loader
# draws when it starts, so that dropout after a resume is other noise there than without one.
FLAGS = """
    --num-layers 2 --hidden-size 56 --ffn-hidden-size 120 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --seq-length 32 --max-position-embeddings 32
    --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 1 --bf16
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size
    6000 --tensor-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 8
    --train-iters 12 --lr 1e-2 --min-lr 0 --lr-decay-style cosine --lr-warmup-iters 2
    --weight-decay 0.1 --split 90,10,0 --eval-iters 1 --eval-interval 1000 --seed 3
    --log-interval 1 --no-create-attention-mask-in-dataloader --save-interval 4
    --optimizer adam_mini
""".split()  # noqa: SIM905
TIMEOUT = 240
# bfloat16 activations: another order of sums changes the third digit.
LOSS_TOLERANCE = 5e-3


def tokenize(prefix: str) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    import tokenize_bytes

    sys.argv = ["tokenize_bytes.py", "--max-bytes", "200000", "--output-prefix", prefix]
    tokenize_bytes.main()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "text"
    run_ranks(1, tokenize, str(prefix))
    return prefix


def script(dataset: Path, folder: Path, *flags: str) -> list[str]:
    """Return the script and flags of a run that saves to a folder and goes on from what is there.

    These are the arguments of the launcher.
    """
    data = ["--data-path", str(dataset), "--data-cache-path", str(dataset.parent / "cache")]
    checkpoints = ["--save", str(folder), "--load", str(folder)]
    return ["--cpu-host", "examples/pretrain_llama.py", *FLAGS, *checkpoints, *data, *flags]


def launch(arguments: list[str]) -> None:
    """Run the launcher in a rank."""
    from megatron_adam_mini import launch as launcher

    launcher.main(arguments)


def start(dataset: Path, folder: Path, *flags: str, ranks: int = 4) -> Program:
    """Start a training run that saves to ``folder`` and goes on from what is there."""
    log = folder.with_suffix(".log")
    return start_program(ranks, launch, script(dataset, folder, *flags), log=log, folder=ROOT)


def finish(run: Program) -> str:
    with run:
        code = run.wait(TIMEOUT)
    assert code == 0, run.output()[-4000:]
    return run.output()


def tracker(folder: Path) -> str:
    path = folder / "latest_checkpointed_iteration.txt"
    return path.read_text().strip() if path.exists() else ""


def everything(folder: Path) -> dict[str, Any]:
    """Return all tensors of a checkpoint, and the state of the schedule."""
    checkpoint = Checkpoint(folder)
    found: dict[str, Any] = {key: checkpoint.read(key) for key in sorted(checkpoint.tensors)}
    found["schedule"] = checkpoint.common["opt_param_scheduler"]
    found["groups"] = checkpoint.optimizer["param_groups"]
    found["step"] = checkpoint.optimizer["step"]
    return found


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right[key]), key
        else:
            assert value == right[key], key


@pytest.fixture(scope="module")
def straight(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    finish(start(dataset, folder))
    assert tracker(folder) == "12"
    return folder


@pytest.mark.support("resume after a kill or a full disk", "test")
def test_killed_while_it_saves_a_run_goes_on_bit_for_bit(
    straight: Path, dataset: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    with start(dataset, broken) as run:
        run.wait_until((broken / "iter_0000008").exists, TIMEOUT)
        run.kill()
    assert tracker(broken) == "4", "the kill came too late to prove anything"
    text = finish(start(dataset, broken))
    assert "successfully loaded checkpoint from" in text
    assert tracker(broken) == "12"
    assert_same(everything(straight / "iter_0000012"), everything(broken / "iter_0000012"))


@pytest.mark.support("resume after a kill or a full disk", "test")
def test_when_the_disk_is_full_a_run_ends_and_keeps_the_old_checkpoint(
    straight: Path, dataset: Path, tmp_path: Path
) -> None:
    """Writes fail in the middle of the second checkpoint, as on a full disk (EFBIG for ENOSPC)."""
    folder = tmp_path / "full"
    with start(dataset, folder) as run:
        run.wait_until(lambda: tracker(folder) == "4", TIMEOUT)
        old = folder / "iter_0000004"
        limit = min(path.stat().st_size for path in old.glob("*.distcp")) * 3 // 4
        for pid in run.family():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
        code = run.wait(TIMEOUT)
    text = run.output()
    assert len(text) < limit, "the limit may have cut the log, too"
    assert code != 0
    assert "File too large" in text, text[-4000:]
    assert max(p.stat().st_size for p in (folder / "iter_0000008").iterdir()) == limit
    assert tracker(folder) == "4"
    assert cli.main(["verify", str(folder)]) == 0
    text = finish(start(dataset, folder))
    assert "at iteration 4" in text
    assert tracker(folder) == "12"
    assert_same(everything(straight / "iter_0000012"), everything(folder / "iter_0000012"))


def test_a_run_goes_on_under_another_layout(straight: Path, dataset: Path, tmp_path: Path) -> None:
    """Same data, sums in another order: the losses agree. With a save at the end."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder, ignore=shutil.ignore_patterns("iter_0000012"))
    (folder / "latest_checkpointed_iteration.txt").write_text("8")
    other = ("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2")
    text = finish(start(dataset, folder, *other, ranks=2))
    losses = losses_of(straight.with_suffix(".log").read_text())
    again = losses_of(text)
    assert sorted(again) == [9, 10, 11, 12]
    assert tracker(folder) == "12"
    assert (folder / "iter_0000012" / ".metadata").exists()
    again.pop(10)  # Megatron logs the mean of two iterations there, the second after a resume
    for iteration, loss in again.items():
        assert loss == pytest.approx(losses[iteration], rel=LOSS_TOLERANCE)


def losses_of(log: str) -> dict[int, float]:
    """Return the loss by iteration, also where a line of one rank stands in that of another.

    Ranks write a text in one piece, but its line break, where Python does not buffer, in another.
    """
    found = re.findall(r" iteration +(\d+)/ *\d+ \|[^\n]*? lm loss: (\S+) \|", log)
    return {int(number): float(loss) for number, loss in found}


def test_losses_are_found_where_ranks_write_into_one_line() -> None:
    memory = "[Rank 0] (after 10 iterations) memory (MB) | allocated: 0.0 | reserved: 0.0"
    line = " [2026-11-28] iteration {}/      12 | loss scale: 1.0 | lm loss: {} | skipped: 0 |"
    first, second = line.format("       9", "5.5E+00"), line.format("      10", "4.5E+00")
    for log in (f"{first}\n{memory}{second}\n\n", f"{first}{memory}\n{second}\n\n"):
        assert losses_of(log) == {9: 5.5, 10: 4.5}
