"""Real Megatron checkpoints for the tests of offline tools, and an independent reader of them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gather import Part, slices_of, weights_of
from tests.megatron_job import Job, Trainer, global_names
from tests.ranks import run_ranks
from tests.test_checkpoint import load, metadata_of, model_state

#: Buckets without padding at DP 1, so that stock Adam's fully_reshardable content is right.
MINI = Job(hidden=64, heads=4, groups=2, ffn=96, vocab=96, layers=2, bf16=True, steps=2)
ADAM = replace(MINI, optimizer="adam")
PLAIN = replace(ADAM, distributed_optimizer=False)
SHARDING = "fully_reshardable"
#: Sizes of latent attention's heads.
LATENT_HEADS = ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
#: Name -> job, ranks, sharding type.
SAVED: dict[str, tuple[Job, int, str | None]] = {
    "adam": (ADAM, 1, SHARDING),
    "adam-tp2": (replace(ADAM, tp=2), 2, SHARDING),
    "plain": (PLAIN, 1, None),
    "mini": (replace(MINI, tp=2, pp=2), 4, SHARDING),
    "mini-slim": (replace(MINI, tp=2, pp=2, adam_mini={"preset": "slim"}), 4, SHARDING),
    "adam-experts": (replace(ADAM, experts=4, ep=2, mtp=1), 2, SHARDING),
    "mini-experts": (replace(MINI, experts=4, ep=2, pp=2, mtp=1), 4, SHARDING),
    "buckets": (replace(MINI, adam_mini={"checkpoint_format": "buckets"}), 2, SHARDING),
}
_made: dict[str, Path] = {}


def saved(name: str, factory: Any) -> Path:
    """Return an iteration folder that a real run saved, once per session; do not write into it."""
    if name not in _made:
        job, world, sharding = SAVED[name]
        folder = factory.mktemp("saved") / name
        run_ranks(world, train_and_save, job, str(folder), sharding)
        _made[name] = folder
    return _made[name]


def args_of(job: Job, dtype: torch.dtype) -> argparse.Namespace:
    """Return the part of Megatron's ``args`` that matters, and some that must survive a copy."""
    from megatron.core.transformer.enums import AttnBackend

    return argparse.Namespace(
        num_layers=job.layers,
        vocab_size=job.vocab,
        hidden_size=job.hidden,
        ffn_hidden_size=job.ffn,
        num_attention_heads=job.heads,
        group_query_attention=job.groups != job.heads,
        num_query_groups=job.groups if job.groups != job.heads else 1,
        kv_channels=job.hidden // job.heads,
        attention_output_gate=job.gated_attention,
        swiglu=job.swiglu,
        rotary_interleaved=False,
        transformer_impl="local",
        tensor_model_parallel_size=job.tp,
        pipeline_model_parallel_size=job.pp,
        expert_model_parallel_size=job.ep,
        num_experts=job.experts,
        moe_grouped_gemm=False,
        attention_backend=AttnBackend.unfused,
        params_dtype=dtype,
        save=Path("/somewhere"),
        **{key: value for key, value in job.config_args.items() if key in LATENT_HEADS},
    )


def save(trainer: Trainer, folder: str, sharding: str | None) -> None:
    """Save as megatron.training does, with its common state."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.utils import _clean_metadata_for_serialization

    metadata = metadata_of(sharding)
    state = model_state(trainer, metadata)
    state["optimizer"] = trainer.optimizer.sharded_state_dict(state, metadata=metadata)
    state["args"] = args_of(trainer.job, trainer.config.params_dtype)
    state["iteration"] = trainer.job.steps
    state["checkpoint_version"] = 3.0
    Path(folder).mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(
        state, folder, content_metadata=_clean_metadata_for_serialization(metadata)
    )


def train_and_save(job: Job, folder: str, sharding: str | None = SHARDING) -> Any:
    """Train, save; return what the optimizer and the model hold, if it is ours."""
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    save(trainer, folder, sharding)
    return slices_of(trainer) if job.optimizer == "adam_mini" else None, weights_of(trainer)


def load_and_train(job: Job, folder: str, steps: int) -> Any:
    """Load; return the state, then train on and return weights and losses."""
    trainer = Trainer(job)
    if job.optimizer == "adam":
        _prepare_stock_adam(trainer)
    load(trainer, folder)
    state = slices_of(trainer) if job.optimizer == "adam_mini" else adam_state(trainer)
    for step in range(job.steps, job.steps + steps):
        trainer.step(step)
    return state, weights_of(trainer), trainer.losses


def load_each(job: Job, folders: list[str]) -> list[list[Part]]:
    """Load checkpoints one after the other; return the state after each, moved in between."""
    trainer, found = Trainer(job), []
    for folder in folders:
        load(trainer, folder)
        found.append(slices_of(trainer))
        trainer.step(job.steps)
    return found


def _prepare_stock_adam(trainer: Trainer) -> None:
    """Help over two faults of Megatron's Adam without Transformer Engine: it cannot load before a
    step, and then does not find torch's per-parameter step, which it has loaded already."""
    trainer.step(0)
    trainer.losses.clear()
    if trainer.job.distributed_optimizer:
        (optimizer,) = trainer.optimizer.chained_optimizers
        original = optimizer._set_main_param_and_optimizer_states
        optimizer._set_main_param_and_optimizer_states = lambda param, tensors: original(
            param, {"step": None, **tensors}
        )


def adam_state(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Return what Megatron's Adam holds, by parameter; one data-parallel rank."""
    (optimizer,) = trainer.optimizer.chained_optimizers
    found = {}
    for name, param in global_names(trainer.chunks).items():
        tensors = optimizer._get_main_param_and_optimizer_states(param)
        found[name] = {
            key: tensors[key].detach().clone().view(param.shape)
            for key in ("param", "exp_avg", "exp_avg_sq")
        }
    return found


def read_all(folder: Path) -> dict[str, Tensor]:
    """Read every tensor with torch's own reader."""
    from torch.distributed import checkpoint

    reader = checkpoint.FileSystemReader(folder)
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "chunks")
    }
    checkpoint.load(state, storage_reader=reader, no_dist=True)
    return state
