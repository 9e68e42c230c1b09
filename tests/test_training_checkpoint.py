"""Checkpoints through megatron.training's own save and load functions, and the offline tools.

One job combines what checkpoints could confuse; one layout saves, others load and save again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adam_mini.cli import main
from tests.gather import slices_of, weights_of, whole_tensors
from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks
from tests.test_checkpoint import BASE, STATE, adam_state, compare_with_adam

FLAGS = """
    --micro-batch-size 1 --global-batch-size 48 --train-iters 10 --lr 1e-3 --swiglu
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization
    --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion
    --no-gradient-accumulation-fusion --no-persist-layer-norm --no-bias-swiglu-fusion
    --save-interval 100 --dist-ckpt-strictness raise_unexpected
    --optimizer adam_mini
""".split()  # noqa: SIM905


def set_megatron_args(job: Job, folder: str, *flags: str) -> Any:
    """Give megatron.training the arguments of a job; its checkpoint functions read them."""
    import megatron_adam_mini

    megatron_adam_mini.register()
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.training import global_vars
    from megatron.training.arguments import parse_args, validate_args

    values = {
        "num-layers": job.layers,
        "hidden-size": job.hidden,
        "ffn-hidden-size": job.ffn,
        "num-attention-heads": job.heads,
        "num-query-groups": job.groups,
        "seq-length": job.sequence,
        "max-position-embeddings": job.sequence,
        "tensor-model-parallel-size": job.tp,
        "pipeline-model-parallel-size": job.pp,
        "load": folder,
        "save": folder,
    }
    switches = {
        "group-query-attention": job.groups != job.heads,
        "attention-output-gate": job.gated_attention,
        "untie-embeddings-and-output-weights": not job.tied,
        "use-distributed-optimizer": job.distributed_optimizer,
        "bf16": job.bf16,
        "fp16": job.fp16,
    }
    given = [f"--{name}={value}" for name, value in values.items()]
    given += [f"--{name}" for name, wanted in switches.items() if wanted]
    sys.argv = ["pretrain", *FLAGS, *given, *flags]
    args = parse_args()
    validate_args(args)
    global_vars.set_args(args)
    init_num_microbatches_calculator(args.rank, None, 48, 1, args.data_parallel_size)
    return args


def save(trainer: Trainer) -> None:
    from megatron.training.checkpointing import save_checkpoint

    save_checkpoint(trainer.job.steps, trainer.chunks, trainer.optimizer, None, 0)


def state_of(trainer: Trainer) -> Any:
    scaler = trainer.optimizer.member.grad_scaler
    return {
        "state": slices_of(trainer),
        "weights": weights_of(trainer),
        "step": trainer.optimizer.inner.main_params.step_count,
        "lr": [group["lr"] for group in trainer.optimizer.param_groups],
        "scaler": scaler and {k: float(v) for k, v in scaler.state_dict().items()},
    }


def train_and_save(job: Job, folder: str, *flags: str) -> Any:
    set_megatron_args(job, folder, *flags)
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    trainer.sync_params()  # as Megatron's loop does before it saves
    save(trainer)
    return state_of(trainer)


def load_and_save(job: Job, folder: str, other: str, *flags: str) -> Any:
    """Load, save elsewhere at once, then train on; return state as loaded, and losses.

    With ``--ckpt-convert-format``, save in that format, as Megatron's ``pretrain`` does then.
    """
    from megatron.training.arguments import update_use_dist_ckpt
    from megatron.training.checkpointing import load_checkpoint

    args = set_megatron_args(job, folder, *flags)
    # What a load does not fill must not be left to chance.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    trainer = Trainer(job)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1.0  # the saved one must come back
    iteration, _ = load_checkpoint(trainer.chunks, trainer.optimizer, None)
    assert iteration == job.steps
    args.save = other
    if args.ckpt_convert_format is not None:
        args.ckpt_format = args.ckpt_convert_format
        update_use_dist_ckpt(args)
    save(trainer)
    found = state_of(trainer)
    trainer.step(job.steps)
    assert all(torch.isfinite(p).all() for chunk in trainer.chunks for p in chunk.parameters())
    return found | {"losses": trainer.losses}


# Everything at once: float16 with a loss scale that moves, tied embeddings on two stages, a
# vocabulary that is padded otherwise, gated attention, SwiGLU, keys with layer numbers.
MIXED = replace(
    BASE,
    bf16=False,
    fp16=True,
    tied=True,
    vocab=90,
    gated_attention=True,
    steps=5,
    config_args={"hetereogenous_dist_checkpoint": True},
    optimizer_args={"initial_loss_scale": 2.0**10, "loss_scale_window": 2, "min_loss_scale": 1.0},
)


@pytest.mark.support("fp16 with loss scale", "reshard")
@pytest.mark.support("fp16 with loss scale", "conversion")
@pytest.mark.support("tied embeddings", "reshard")
@pytest.mark.support("tied embeddings", "conversion")
@pytest.mark.support("attention output gate", "reshard")
@pytest.mark.support("attention output gate", "conversion")
def test_replicated_to_sharded_state_and_back_through_adam(tmp_path: Path) -> None:
    """Without the distributed optimizer at TP 2 x PP 2, with it at DP 3, without it at TP 2."""
    wide = replace(MIXED, tp=2, pp=2, padded_vocab=128, distributed_optimizer=False)
    last_job = replace(wide, pp=1)
    narrow = replace(MIXED, padded_vocab=96)
    folders = [str(tmp_path / name) for name in "abcde"]
    saved = run_ranks(4, train_and_save, wide, folders[0])
    assert saved[0]["scaler"]["scale"] != 2.0**10, "the loss scale never moved"
    middle = run_ranks(3, load_and_save, narrow, folders[0], folders[1])
    compare_unpadded(saved, wide, middle, narrow)
    for command in (["verify"], ["convert", "--to", "adam"]):
        rest = folders[1:2] if command == ["verify"] else folders[1:3]
        assert main([*command, *rest]) == 0
    assert main(["convert", "--to", "adam-mini", *folders[2:4]]) == 0
    assert main(["verify", folders[3]]) == 0
    last = run_ranks(2, load_and_save, last_job, folders[3], folders[4])
    compare_unpadded(middle, narrow, last, last_job)


def compare_unpadded(saved: list[Any], saved_job: Job, loaded: list[Any], job: Job) -> None:
    """Compare all values bit for bit; padding that was not stored has no history."""
    word = "embedding.word_embeddings.weight"
    for key in (*STATE, "weight"):
        part = "weights" if key == "weight" else "state"
        before = whole_tensors([r[part] for r in saved], key, saved_job)
        after = whole_tensors([r[part] for r in loaded], key, job)
        for name, value in after.items():
            expected = before[word if job.tied and name == "output_layer.weight" else name]
            if expected.shape != value.shape:
                assert name in (word, "output_layer.weight")
                rows = min(saved_job.padded_vocab, job.padded_vocab)
                assert rows >= job.vocab
                if key in ("exp_avg", "v"):
                    assert not value[rows:].any(), f"{key} {name}: padding"
                expected, value = expected[:rows], value[:rows]
            assert torch.equal(expected, value), f"{key} {name}"
            if key == "exp_avg":
                assert value.abs().max() > 0, f"{name}: the state never moved"
    for key in ("step", "scaler"):
        assert all(r[key] == saved[0][key] for r in loaded), key
    assert {lr for r in loaded for lr in r["lr"]} == {saved_job.lr}


def test_megatrons_default_flags_give_a_checkpoint_for_any_layout(tmp_path: Path) -> None:
    """Of Megatron's own format by default, TP and PP could not change."""
    assert not any("reshardable" in flag or "checkpoint-format" in flag for flag in FLAGS)
    folders = [str(tmp_path / name) for name in "ab"]
    job = replace(BASE, pp=2, layers=2, steps=1)
    saved = run_ranks(4, train_and_save, job, folders[0])
    other = replace(job, tp=2, pp=1)
    compare_unpadded(saved, job, run_ranks(2, load_and_save, other, *folders), other)
    buckets = replace(job, pp=1, adam_mini={"checkpoint_format": "buckets"})
    folders = [str(tmp_path / name) for name in "cd"]
    saved = run_ranks(2, train_and_save, buckets, folders[0])
    wider = replace(buckets, adam_mini={})
    compare_unpadded(saved, buckets, run_ranks(1, load_and_save, wider, *folders), wider)
    with pytest.raises(RankError, match="mismatch after resume"):  # Megatron's own refusal
        run_ranks(2, load_and_save, replace(wider, tp=2), *folders)


def save_plain_adam(job: Job, folder: str) -> Any:
    set_megatron_args(job, folder, "--optimizer", "adam")
    trainer = Trainer(job)
    trainer.step(0)
    save(trainer)
    return (adam_state(trainer),)


def test_adam_without_the_distributed_optimizer_starts_a_run_with_it(tmp_path: Path) -> None:
    """Under other TP and PP sizes, for which Megatron asks the metadata for a format it lacks."""
    adam_job = replace(BASE, tp=2, layers=2, steps=1, optimizer="adam", distributed_optimizer=False)
    adam = run_ranks(2, save_plain_adam, adam_job, str(tmp_path / "a"))
    job = replace(adam_job, tp=1, optimizer="adam_mini", distributed_optimizer=True)
    loaded = run_ranks(2, load_and_save, job, str(tmp_path / "a"), str(tmp_path / "b"))
    compare_with_adam(adam, adam_job, [(r["state"],) for r in loaded], job)


@pytest.mark.support("checkpoint format torch, and its conversion", "test")
def test_format_torch_and_its_conversion_to_torch_dist_and_back(tmp_path: Path) -> None:
    job = replace(BASE, tp=2, pp=2)
    narrow = replace(BASE, steps=job.steps)
    folders = [str(tmp_path / name) for name in "abcd"]
    to_torch = ("--ckpt-convert-format", "torch", "--ckpt-convert-save", "unused")
    to_dist = ("--ckpt-convert-format", "torch_dist", "--ckpt-convert-save", "unused")
    saved = run_ranks(8, train_and_save, job, folders[0], "--ckpt-format", "torch")
    assert len(list(tmp_path.glob("a/iter_*/mp_rank_*/distrib_optim.pt"))) == 4
    kept = run_ranks(
        4, load_and_save, job, folders[0], folders[1], "--ckpt-format", "torch", *to_dist
    )
    compare_unpadded(saved, job, kept, job)
    spread = run_ranks(2, load_and_save, narrow, folders[1], folders[2], *to_torch)
    compare_unpadded(saved, job, spread, narrow)
    last = run_ranks(1, load_and_save, narrow, folders[2], folders[3], "--ckpt-format", "torch")
    compare_unpadded(saved, job, last, narrow)
