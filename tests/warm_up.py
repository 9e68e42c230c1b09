"""One rank of a parallel layout, without the other ranks: what a warm-up does, and what it leaves.

A collective would fail here: there are no process groups.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.launches import rank_plan
from megatron_adam_mini.collectives import DomainGroups
from megatron_adam_mini.config import AdamMiniConfig, OffloadConfig
from megatron_adam_mini.estimate.models import Model
from megatron_adam_mini.estimate.parallel import Parallel
from megatron_adam_mini.optimizer import AdamMini

CPU = torch.device("cpu")
MODEL = Model(
    num_layers=1,
    hidden_size=32,
    num_attention_heads=2,
    vocab_size=128,
    swiglu=True,
    position_embedding_type="rope",
    normalization="RMSNorm",
)
LAYOUT = Parallel(tensor_model_parallel_size=2, data_parallel_size=4)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_SMALL = {"param_remainders": True, "exp_avg_dtype": "bf16", "stochastic_rounding": True}
#: Options, dtypes of weights and gradients, and the fraction of the state in host memory.
MODES: dict[str, tuple[dict[str, Any], torch.dtype, torch.dtype, float]] = {
    "bf16 weights": ({}, BF16, FP32, 0.0),
    "fp16 weights and gradients": ({}, FP16, FP16, 0.0),
    "fp32 weights": ({}, FP32, FP32, 0.0),
    "small state, bf16 gradients": (_SMALL, BF16, BF16, 0.0),
    "columns": ({"preset": "slim"}, BF16, FP32, 0.0),
    "elementwise": ({"full_v": ("*",)}, BF16, FP32, 0.0),
    "single phase": ({"single_phase": True}, BF16, FP32, 0.0),
    # Needs a rank, where the CPU host answers for streams.
    "half on the host": ({**_SMALL, "preset": "slim", "full_v": ("*norm*",)}, BF16, FP32, 0.5),
}
HALF_ON_THE_HOST = "half on the host"


def make_rank(mode: str, backend: str) -> AdamMini:
    """Return the optimizer of one rank, whose state and gradients are full of random bits."""
    options, weight_dtype, grad_dtype, fraction = MODES[mode]
    config = AdamMiniConfig(backend=backend, **options)
    plan = rank_plan(MODEL, LAYOUT, config)
    generator = torch.Generator().manual_seed(1)
    buffers = []
    for layout in (layout for domain in plan.domains for layout in domain.buffers):
        numel = layout.buckets[-1].offset + layout.buckets[-1].numel
        weight = torch.randn(numel, generator=generator).to(weight_dtype)
        grad = torch.randn(numel, generator=generator).to(grad_dtype)
        grad[::7] = torch.nan
        buffers.append(SimpleNamespace(grad=grad, weight=weight, values=weight.__getitem__))
    # Learning rates of Megatron's groups may be unknown before its scheduler is made.
    groups = [{"lr": None, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": d} for d in (0.1, 0)]
    optimizer = AdamMini(
        plan,
        config,
        buffers,
        [DomainGroups()] * len(plan.domains),
        groups,
        [index % 2 for index in range(len(plan.parameters))],
        device=CPU,
        offload=OffloadConfig(fraction=fraction),
    )
    for tensor in optimizer.main_params.attach().flat_tensors():
        bits = tensor.view(torch.int16)
        bits.copy_(torch.randint(-(2**15), 2**15, bits.shape, generator=generator))
    return optimizer


def lasting(optimizer: AdamMini) -> dict[str, Any]:
    """Return copies of all that lasts from one step to the next."""
    state = optimizer.main_params.attach()
    tensors = [t for b in optimizer.buffers for t in (b.grad, b.weight)] + state.flat_tensors()
    groups = [{k: v for k, v in g.items() if k != "params"} for g in _groups(optimizer)]
    return {
        "bytes": [_bytes(tensor).clone() for tensor in tensors],
        "places": [tensor.data_ptr() for tensor in tensors],
        "groups": groups,
        "updated": optimizer.updated,
    }


def assert_unchanged(optimizer: AdamMini, before: dict[str, Any]) -> None:
    """Assert that all that lasts is bit-equal to what :func:`lasting` returned."""
    after = lasting(optimizer)
    for name in ("places", "groups", "updated"):
        assert after[name] == before[name]
    for found, expected in zip(after["bytes"], before["bytes"], strict=True):
        assert torch.equal(found, expected)


def _groups(optimizer: AdamMini) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = optimizer.main_params.param_groups
    return groups


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.uint8)
