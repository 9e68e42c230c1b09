"""A small real Megatron-Core training job whose weights and data do not depend on the layout.

Runs inside the ranks that ``ranks.run_ranks`` starts.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.models import FAMILIES, Family


@dataclass(frozen=True)
class Job:
    """Layout, model and training options of one job. Defaults: 1 rank, tiny Llama, float32."""

    family: str = "gpt"  # or one of models.FAMILIES
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int | None = None  # tensor-parallel size of experts, if another one
    experts: int | None = None  # routed experts of each layer, two of which take each token
    mtp: int | None = None  # depths of multi-token prediction
    layers: int = 2
    hidden: int = 64
    heads: int = 8
    groups: int = 4
    ffn: int = 96
    vocab: int = 128
    padded_vocab: int | None = None  # rows of the vocabulary's weights, if there are more
    gated_attention: bool = False
    swiglu: bool = True
    bias: bool = False
    qk_layernorm: bool = False
    tied: bool = False
    fused_norms: bool = False  # parameter names as Transformer Engine's
    sequence_parallel: bool = False
    bf16: bool = False
    fp16: bool = False
    grad_fp32: bool = True
    fp8: str | None = None  # how weights are quantized, see fp8_weights.py
    bucket_size: int | None = None
    overlap: bool = False
    distributed_optimizer: bool = True
    instances: int = 1
    optimizer: str = "adam_mini"
    adam_mini: dict[str, Any] = field(default_factory=dict)
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    config_args: dict[str, Any] = field(default_factory=dict)
    pipeline_args: dict[str, Any] = field(default_factory=dict)  # of the config, for some pp only
    ddp_args: dict[str, Any] = field(default_factory=dict)
    float32_modules: tuple[str, ...] = ()  # kept in float32 within a 16-bit model
    frozen: tuple[str, ...] = ()  # parameters whose global name starts with one of these
    lr: float = 2e-3
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    batch: int = 48  # divisible by every data-parallel size times two micro-batches
    micro_batches: int = 2
    sequence: int = 8
    steps: int = 10


#: A small mixture of experts: 16 of 24 rows of each take a token, and no token is dropped.
MOE: dict[str, Any] = {
    "moe_ffn_hidden_size": 24,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}


class Trainer:
    """Model, optimizer and training step of one rank."""

    def __init__(self, job: Job) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel
        from megatron.core.distributed import DistributedDataParallelConfig as DDPConfig
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        self.job = job
        self.family = FAMILIES.get(job.family) or Family()
        parallel_state.initialize_model_parallel(
            job.tp,
            job.pp,
            job.vpp,
            context_parallel_size=job.cp,
            expert_model_parallel_size=job.ep,
            expert_tensor_parallel_size=job.etp,
            num_distributed_optimizer_instances=job.instances,
        )
        model_parallel_cuda_manual_seed(7)
        dtype = torch.bfloat16 if job.bf16 else torch.float16 if job.fp16 else torch.float32
        config_class = self.family.config_class()
        self.config = config_class(
            num_layers=job.layers,
            hidden_size=job.hidden,
            num_attention_heads=job.heads,
            num_query_groups=job.groups,
            ffn_hidden_size=job.ffn,
            attention_output_gate=job.gated_attention,
            gated_linear_unit=job.swiglu,
            activation_func=torch.nn.functional.silu if job.swiglu else torch.nn.functional.gelu,
            add_bias_linear=job.bias,
            qk_layernorm=job.qk_layernorm,
            normalization="RMSNorm",
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=job.tp,
            pipeline_model_parallel_size=job.pp,
            virtual_pipeline_model_parallel_size=job.vpp,
            context_parallel_size=job.cp,
            # Megatron trains experts under tensor parallelism with sequence parallelism only.
            sequence_parallel=job.sequence_parallel or bool(job.experts and job.tp > 1),
            expert_model_parallel_size=job.ep,
            expert_tensor_parallel_size=job.etp,
            num_moe_experts=job.experts,
            mtp_num_layers=job.mtp,
            bf16=job.bf16,
            fp16=job.fp16,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            overlap_p2p_comm=job.vpp is not None,
            batch_p2p_comm=job.vpp is None,
            deallocate_pipeline_outputs=False,
            **(MOE if job.experts else {}) | job.config_args | job.pipeline_args,
        )
        ddp_config = DDPConfig(
            grad_reduce_in_fp32=job.grad_fp32,
            overlap_grad_reduce=job.overlap,
            overlap_param_gather=job.overlap and job.distributed_optimizer,
            use_distributed_optimizer=job.distributed_optimizer,
            num_distributed_optimizer_instances=job.instances,
            bucket_size=job.bucket_size,
            fp8_param_gather=job.fp8 is not None,
            **job.ddp_args,
        )
        self.chunks = []
        for chunk in range(job.vpp or 1):
            model = self._build_chunk(chunk if job.vpp else None)
            set_weights(model, job)
            if job.bf16 or job.fp16:
                from megatron.core.transformer.module import Float16Module

                model = Float16Module(self.config, model)
                _keep_float32(model, job, dtype)
            if job.fp8:
                from tests.fp8_weights import quantize_weights

                quantize_weights(model, job.fp8)
            for name, param in global_names([model]).items():
                param.requires_grad_(not name.startswith(job.frozen or ("-",)))
            self.chunks.append(
                DistributedDataParallel(
                    config=self.config,
                    ddp_config=ddp_config,
                    module=model,
                    disable_bucketing=job.bucket_size is None,
                )
            )
        self.config.finalize_model_grads_func = finalize_model_grads
        if job.overlap:
            self.config.no_sync_func = _one_or_list([c.no_sync for c in self.chunks])
            if job.vpp:
                self.config.grad_sync_func = [c.start_grad_sync for c in self.chunks]
                if job.distributed_optimizer:
                    self.config.param_sync_func = [c.start_param_sync for c in self.chunks]
        self.optimizer = self._build_optimizer()
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.losses: list[float] = []

    def _build_chunk(self, vp_stage: int | None) -> Any:
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_decoder_block_spec,
            get_gpt_layer_local_spec,
            get_gpt_mtp_block_spec,
        )

        job = self.job
        stage = {
            "pre_process": parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            "post_process": parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
        }
        model = self.family.build(self.config, job, **stage)
        if model is not None:
            return model
        spec: Any = get_gpt_layer_local_spec(
            qk_layernorm=job.qk_layernorm,
            multi_latent_attention=self.config.multi_latent_attention,
            normalization="RMSNorm",
        )
        if job.experts:
            spec = get_gpt_decoder_block_spec(
                self.config, False, normalization="RMSNorm", vp_stage=vp_stage
            )
        spec = self.family.layers(spec, self.config)
        if job.fused_norms:
            from tests.fused_norms import fused_norm_layer_spec

            spec = fused_norm_layer_spec()
        mtp_spec = None
        if job.mtp:
            mtp_spec = get_gpt_mtp_block_spec(self.config, spec, False, vp_stage=vp_stage)
        return GPTModel(
            config=self.config,
            mtp_block_spec=mtp_spec,
            transformer_layer_spec=spec,
            vocab_size=job.padded_vocab or job.vocab,
            max_sequence_length=job.sequence,
            share_embeddings_and_output_weights=job.tied,
            position_embedding_type="rope",
            vp_stage=vp_stage,
            **stage,
        )

    def _build_optimizer(self) -> Any:
        import megatron_adam_mini
        from megatron_adam_mini import AdamMiniConfig

        job = self.job
        if job.optimizer == "adam_mini":
            megatron_adam_mini.register()
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        config = OptimizerConfig(
            optimizer=job.optimizer,
            lr=job.lr,
            min_lr=0.0,
            weight_decay=job.weight_decay,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=1e-8,
            clip_grad=job.clip_grad,
            bf16=job.bf16,
            fp16=job.fp16,
            params_dtype=self.config.params_dtype,
            use_distributed_optimizer=job.distributed_optimizer,
            overlap_param_gather=job.overlap and job.distributed_optimizer,
            **job.optimizer_args,
        )
        if job.optimizer == "adam_mini":
            # Another backend for all tests: ADAM_MINI_TEST_BACKEND, see test_backends.py.
            backend = os.environ.get("ADAM_MINI_TEST_BACKEND", AdamMiniConfig.backend)
            config.adam_mini = AdamMiniConfig(**{"backend": backend, **job.adam_mini})
        optimizer = get_megatron_optimizer(config, self.chunks)
        for group in optimizer.param_groups:  # as Megatron's scheduler does in its first step
            group["weight_decay"] = job.weight_decay * group["wd_mult"]
        return optimizer

    def batch_of(self, step: int) -> torch.Tensor:
        """Return the token ids of one global batch, shape ``(batch, sequence + 1)``."""
        generator = torch.Generator().manual_seed(1000 + step)
        shape = (self.job.batch, self.job.sequence + 1)
        return torch.randint(0, self.job.vocab, shape, generator=generator)

    def backward(self, step: int) -> None:
        """Run forward and backward passes of one global batch; gradients end in the buffers."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.utils import get_batch_on_this_cp_rank

        job = self.job
        mine = self.batch_of(step)[self.dp_rank :: self.dp_size]
        micro = job.batch // self.dp_size // job.micro_batches
        assert micro * job.micro_batches * self.dp_size == job.batch
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def forward(iterator: Any, model: Any) -> Any:
            tokens = next(iterator)
            position = torch.arange(job.sequence).expand(len(tokens), -1)
            mask = torch.triu(torch.ones(job.sequence, job.sequence, dtype=torch.bool), 1)
            batch = {
                "tokens": tokens[:, :-1].contiguous(),
                "position_ids": position,
                "attention_mask": mask[None, None].expand(len(tokens), 1, -1, -1),
                "labels": tokens[:, 1:].contiguous(),
            }
            group = parallel_state.get_context_parallel_group()
            batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
            output = self.family.losses(model, batch)

            def loss_of(output: torch.Tensor) -> Any:
                # Megatron multiplies a loss without a number of tokens by the size of the group.
                loss = output.float().mean() / job.cp
                return loss, {"loss": loss.detach()}

            return output, loss_of

        iterators = [iter(mine.split(micro)) for _ in self.chunks]
        reports = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if job.vpp else iterators[0],
            model=self.chunks if job.vpp else self.chunks[0],
            num_microbatches=job.micro_batches,
            seq_length=job.sequence,
            micro_batch_size=micro,
            forward_only=False,
        )
        if reports:
            self.losses.append(float(sum(r["loss"] for r in reports)))

    def step(self, step: int) -> tuple[bool, Any, Any]:
        """Run one whole training step."""
        self.backward(step)
        return self.optimizer.step()

    def sync_params(self) -> None:
        """Wait for parameter gathers that overlap the next forward pass."""
        for chunk in self.chunks:
            if self.job.overlap and self.job.distributed_optimizer:
                chunk.start_param_sync(force_sync=True)


def global_names(chunks: list[Any]) -> dict[str, torch.nn.Parameter]:
    """Map names with global numbers of layers and experts to parameters.

    Written apart from the package.
    """
    from megatron.core import parallel_state

    found = {}
    for chunk in chunks:
        held = {
            name: parallel_state.get_expert_model_parallel_rank() * module.num_local_experts
            for name, module in chunk.named_modules()
            if name.endswith(".experts")
        }
        numbers = {
            name: module.layer_number - 1
            for name, module in chunk.named_modules()
            if name.rpartition(".")[0].endswith("layers") and hasattr(module, "layer_number")
        }
        for full, param in chunk.named_parameters():
            name = full
            for prefix, number in numbers.items():
                if name.startswith(prefix + "."):
                    stem = prefix.rpartition(".")[0]
                    name = f"{stem}.{number}{name[len(prefix) :]}"
                    break
            for experts, first in held.items():
                before, local, after = name.partition(".local_experts.")
                if local and full.startswith(experts + "."):
                    number, _, rest = after.partition(".")
                    name = f"{before}{local}{first + int(number)}.{rest}"
            found[name.replace("module.", "")] = param
    return found


def is_routed(name: str) -> bool:
    """Return whether a parameter belongs to a routed expert."""
    return ".local_experts." in name


def split_size(name: str, job: Job) -> int:
    """Return how many tensor-parallel ranks share a parameter."""
    return job.tp if job.etp is None or not is_routed(name) else job.etp


def split_rank(name: str) -> int:
    """Return this rank among them."""
    from megatron.core import parallel_state

    if is_routed(name):
        return parallel_state.get_expert_tensor_parallel_rank()
    return parallel_state.get_tensor_model_parallel_rank()


def whole_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the initial value of a whole parameter, a function of its name alone."""
    # So that tied and untied models start alike.
    name = re.sub(r"(^|\.)output_layer.weight$", r"\1embedding.word_embeddings.weight", name)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    return 1.0 + 0.1 * noise if "norm" in name else 0.05 * noise


def split_dim_of(name: str, param: torch.Tensor) -> int | None:
    """Return the dimension that tensor parallelism splits."""
    if name.endswith("softmax_offset"):
        return 0  # one number for each head, which Megatron does not mark as split
    split = getattr(param, "tensor_model_parallel", False)
    return param.partition_dim if split else None  # type: ignore[attr-defined]


def parts_of(name: str, rows: int, job: Job) -> list[int] | None:
    """Return the rows of each projection in a fused weight, which are split apart over ranks."""
    family = FAMILIES.get(job.family) or Family()
    if family.job_of(name, job).swiglu and "linear_fc1" in name:
        return [rows // 2, rows // 2]
    parts = family.parts(name)
    return None if parts is None else list(parts)


def shard_of(name: str, whole: torch.Tensor, param: torch.Tensor, job: Job, rank: int) -> Any:
    """Return one tensor-parallel rank's part of a whole tensor (also of labels or of v)."""
    size, split_dim = split_size(name, job), split_dim_of(name, param)
    if split_dim is None or size == 1:
        return whole
    parts = parts_of(name, len(whole), job)
    if parts is not None:
        return torch.cat([part.chunk(size)[rank] for part in whole.split(parts)])
    return whole.chunk(size, dim=split_dim)[rank]


def whole_shape(name: str, param: torch.Tensor, job: Job) -> tuple[int, ...]:
    """Return the shape of the whole parameter."""
    shape = list(param.shape)
    split_dim = split_dim_of(name, param)
    if split_dim is not None:
        shape[split_dim] *= split_size(name, job)
    return tuple(shape)


def set_weights(model: Any, job: Job) -> None:
    """Give a model chunk its part of the layout-independent initial weights."""
    with torch.no_grad():
        for name, param in global_names([model]).items():
            whole = whole_weight(name, whole_shape(name, param, job))
            param.copy_(shard_of(name, whole, param, job, split_rank(name)))


def _keep_float32(model: Any, job: Job, dtype: torch.dtype) -> None:
    for name, module in model.named_modules():
        if job.float32_modules and name.endswith(job.float32_modules):
            module.float()
            module.register_forward_pre_hook(lambda _, args: tuple(a.float() for a in args))
            module.register_forward_hook(lambda _, args, output: output.to(dtype))


def _one_or_list(items: list[Callable[..., Any]]) -> Any:
    return items if len(items) > 1 else items[0]
