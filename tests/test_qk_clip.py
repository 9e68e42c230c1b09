"""QK-clip scales Query and Key rows of main parameters as Megatron does, wherever they are.

The expected values come from Megatron's own ``clip_qk`` on whole main parameters: its Adam on one
rank without the distributed optimizer, the only one of its layouts for which it works.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gather import slices_of, weights_of, whole_tensors
from tests.megatron_job import Job, Trainer, global_names
from tests.ranks import run_ranks
from tests.test_oracle import BASE, check_replicas, check_same_gradients, world_of

THRESHOLD = 100.0
# torch's powers differ by a unit in the last place between long and short vectors, on a CPU.
POWER_TOLERANCE = 2.0**-22
CLIPPED = {"qk_clip": True, "qk_clip_threshold": THRESHOLD, "qk_clip_alpha": 0.3}
JOB = replace(BASE, bf16=True, config_args=CLIPPED, steps=2)
#: Job and data-parallel size.
LAYOUTS = {
    "tp2, pp2, dp2, overlap": (replace(JOB, tp=2, pp=2), 2),
    "dp3, slices that cut rows": (replace(JOB, overlap=False), 3),
    "tp2, instances": (replace(JOB, tp=2, instances=2), 2),
    "remainders, dp2": (replace(JOB, overlap=False, adam_mini={"param_remainders": True}), 2),
    "remainders and bf16 m, tp2": (
        replace(JOB, tp=2, adam_mini={"param_remainders": True, "exp_avg_dtype": "bf16"}),
        1,
    ),
    "replicated, tp2": (replace(JOB, tp=2, distributed_optimizer=False), 1),
    "state on the host, dp2": (
        replace(
            JOB, optimizer_args={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.7}
        ),
        2,
    ),
    "virtual stages": (replace(JOB, layers=4, pp=2, vpp=2), 1),
    "virtual stages, a gather within the step": (
        replace(
            JOB,
            layers=4,
            pp=2,
            vpp=2,
            optimizer_args={"overlap_param_gather_with_optimizer_step": True},
        ),
        2,
    ),
    "fp16": (
        replace(JOB, bf16=False, fp16=True, optimizer_args={"initial_loss_scale": 64.0}),
        2,
    ),
}


def clip(trainer: Trainer) -> None:
    """Clip as the training loop does; only the first data-parallel rank has seen the logits."""
    from megatron.core import parallel_state
    from megatron.core.optimizer.qk_clip import clip_qk

    job = trainer.job
    rank = parallel_state.get_tensor_model_parallel_rank()
    for module in attentions(trainer):
        seen = torch.linspace(20.0, 300.0, job.heads) * module.layer_number
        if trainer.dp_rank > 0:
            seen *= 0.1
        module.core_attention.current_max_attn_logits = seen.chunk(job.tp)[rank].clone()
    largest = clip_qk(trainer.chunks)
    assert largest > THRESHOLD
    for module in attentions(trainer):
        assert module.core_attention.current_max_attn_logits is None


def attentions(trainer: Trainer) -> list[Any]:
    return [
        module
        for chunk in trainer.chunks
        for module in chunk.modules()
        if hasattr(module, "core_attention")
    ]


def megatrons(job: Job) -> dict[str, Tensor]:
    """Return whole main parameters that Megatron has clipped, before any step."""
    plain = replace(
        job, tp=1, pp=1, vpp=None, instances=1, overlap=False, bucket_size=None, adam_mini={},
        distributed_optimizer=False, optimizer="adam", optimizer_args={},
    )  # fmt: skip
    trainer = Trainer(plain)
    clip(trainer)
    return {
        name: param.main_param.detach().clone()
        for name, param in global_names(trainer.chunks).items()
    }


def clipped_run(job: Job) -> dict[str, Any]:
    """Clip, train, and clip again."""
    trainer = Trainer(job)
    start = slices_of(trainer)
    clip(trainer)
    initial = slices_of(trainer)
    trainer.sync_params()
    weights = weights_of(trainer)
    grads, norms, scales = [], [], []
    for step in range(job.steps):
        scales.append(float(trainer.optimizer.get_loss_scale()))
        trainer.backward(step)
        grads.append(slices_of(trainer, grads_only=True))
        norms.append(trainer.optimizer.step()[1])
    final = slices_of(trainer)
    clip(trainer)
    trainer.sync_params()
    return {
        "start": start,
        "initial": initial,
        "first": {"weights": weights, "final": initial},
        "grads": grads,
        "norms": norms,
        "scales": scales,
        "final": final,
        "last": {"weights": weights_of(trainer), "final": slices_of(trainer)},
    }


@pytest.mark.support("qk-clip", "oracle")
@pytest.mark.parametrize("case", LAYOUTS)
def test_main_parameters_are_scaled_as_by_megatron_under_any_layout(case: str) -> None:
    job, dp = LAYOUTS[case]
    (expected,) = run_ranks(1, megatrons, job)
    ranks = run_ranks(world_of(job, dp), clipped_run, job)
    start, clipped = (
        whole_tensors([rank[key] for rank in ranks], "param", job) for key in ("start", "initial")
    )
    for name, value in clipped.items():
        torch.testing.assert_close(value, expected[name], rtol=POWER_TOLERANCE, atol=0.0, msg=name)
        assert ("linear_qkv" in name) != torch.equal(value, start[name]), name
    for key in ("first", "last"):
        check_replicas([rank[key] for rank in ranks], job)
    if job.adam_mini.get("exp_avg_dtype") != "bf16":
        check_same_gradients(ranks, job)
    before, after = (
        {
            key: whole_tensors([part(rank) for rank in ranks], key, job)
            for key in ("param", "exp_avg", "v")
        }
        for part in (lambda rank: rank["final"], lambda rank: rank["last"]["final"])
    )
    for name, value in after["param"].items():
        assert ("linear_qkv" in name) != torch.equal(value, before["param"][name]), name
    for key in ("exp_avg", "v"):
        assert all(torch.equal(after[key][name], value) for name, value in before[key].items())


class NoCore(torch.nn.Module):
    """Holds the logits that a core attention would have seen."""

    def __init__(self, **_: Any) -> None:
        super().__init__()


def latent_attention(job: Job, q_lora_rank: int | None) -> dict[str, Any]:
    """Clip the main parameters of one latent attention; return them, whole or not, by name."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import MLATransformerConfig
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    import megatron_adam_mini

    parallel_state.initialize_model_parallel(job.tp)
    model_parallel_cuda_manual_seed(7)
    config = MLATransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, q_lora_rank=q_lora_rank,
        kv_lora_rank=8, qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=6, rope_type="rope",
        tensor_model_parallel_size=job.tp, use_cpu_initialization=True, bf16=True,
        params_dtype=torch.bfloat16, **CLIPPED,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(multi_latent_attention=True)
    submodules = replace(spec.submodules.self_attention.submodules, core_attention=NoCore)
    module = MLASelfAttention(config, submodules, layer_number=1).bfloat16()
    distributed_optimizer = job.optimizer == "adam_mini"
    chunk = DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer),
        module=module,
    )
    with torch.no_grad():
        for param in module.parameters():
            rank = parallel_state.get_tensor_model_parallel_rank()
            whole = torch.linspace(-1, 1, param.numel() * job.tp)
            split = getattr(param, "tensor_model_parallel", False)
            part = whole.chunk(job.tp)[rank] if split else whole[: param.numel()]
            param.copy_(part.view_as(param))
    megatron_adam_mini.register()
    optimizer_config = OptimizerConfig(
        optimizer=job.optimizer, lr=1e-3, bf16=True, params_dtype=torch.bfloat16,
        use_distributed_optimizer=distributed_optimizer,
    )  # fmt: skip
    # Without a layer around it, the module is not in "self_attention", and its projection unknown.
    rules = (("linear_proj.weight", "row"),)
    optimizer_config.adam_mini = megatron_adam_mini.AdamMiniConfig(rules=rules)
    optimizer = get_megatron_optimizer(optimizer_config, [chunk])
    names = {param: name for name, param in module.named_parameters()}
    before = {name: param.detach().float().view(-1) for param, name in names.items()}
    logits = torch.linspace(20.0, 300.0, 4).chunk(job.tp)
    module.core_attention.current_max_attn_logits = logits[rank].clone()
    module.clip_qk()
    assert module.core_attention.current_max_attn_logits is None
    weights = {name: param.detach().float() for param, name in names.items()}
    if not distributed_optimizer:
        masters = {name: param.main_param.detach().view(-1) for param, name in names.items()}
        return {"masters": masters, "weights": weights, "rank": 0}
    inner, member = optimizer.inner, optimizer.member
    masters = {}
    for piece in inner.plan.pieces:
        held = inner.main_params.attach().of(piece)
        name = names[member.model_params[piece.parameter]]
        masters[name] = (piece.begin, held.main_param(piece.window).clone())
    return {"masters": masters, "weights": weights, "before": before, "rank": rank}


@pytest.mark.parametrize("q_lora_rank", [None, 6])
@pytest.mark.parametrize("tp", [1, 2])
def test_rows_of_latent_attention_are_scaled_as_by_megatron(
    q_lora_rank: int | None, tp: int
) -> None:
    (expected,) = run_ranks(1, latent_attention, Job(optimizer="adam"), q_lora_rank)
    changed = 0
    ranks = run_ranks(2, latent_attention, Job(tp=tp), q_lora_rank)
    for rank in ranks:
        for name, (begin, values) in rank["masters"].items():
            if not ("up_proj" in name or "q_proj" in name):
                assert torch.equal(values, rank["before"][name][begin : begin + len(values)]), name
                continue
            mine = expected["masters"][name].chunk(tp)[rank["rank"]]
            torch.testing.assert_close(
                values, mine[begin : begin + len(values)], rtol=POWER_TOLERANCE, atol=0.0, msg=name
            )
            changed += 1
        for name, weight in rank["weights"].items():
            if tp == 1:  # gathered
                assert torch.equal(weight, ranks[0]["weights"][name]), name
    assert changed


def refused(job: Job) -> str:
    with pytest.raises(NotImplementedError) as caught:
        Trainer(job)
    return str(caught.value)


def test_a_key_of_several_ranks_is_refused_on_all() -> None:
    for text in run_ranks(2, refused, replace(JOB, tp=2, groups=1)):
        assert "--qk-clip with --num-query-groups 1 and --tensor-model-parallel-size 2" in text
        assert "Remedy: a tensor-parallel size of at most 1, or drop --qk-clip" in text
