"""Small models of other families than GPT for ``megatron_job``: how to build and to run them.

A family says what a model is made of, what comes out of it, and, for the oracle, which rows of its
weights share one second moment. The latter is written from docs/partition.md, not with the package.

Megatron-Core needs kernels that run on GPUs only for some layers; the stand-ins here compute the
same on a CPU, slowly.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from tests.megatron_job import Job


class Family:
    """GPT with Megatron's own layers; other families override what differs."""

    #: Weights that hold several projections: end of the name -> rows of each in the whole weight.
    fused: ClassVar[dict[str, tuple[int, ...]]] = {}
    #: Weights with heads: end of the name -> for one head, (rows, whether they are one block) of
    #: each part.
    heads: ClassVar[dict[str, tuple[tuple[int, bool], ...]]] = {}
    #: Ends of names of matrices (or tensors of more dimensions) with one v per element.
    elementwise: tuple[str, ...] = ()

    def config_class(self) -> Any:
        """Return the class of the model's config."""
        from megatron.core.transformer import TransformerConfig

        return TransformerConfig

    def build(self, config: Any, job: Job, **stage: Any) -> Any:
        """Return a model chunk; ``None``: a GPT of the layers that ``layers`` returns.

        Args:
            config: of the model.
            job: of the run.
            stage: ``pre_process`` and ``post_process``.
        """
        return None

    def layers(self, spec: Any, config: Any) -> Any:
        """Return what a GPT's layers are made of, given Megatron's local ones."""
        return spec

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Run a chunk; return the losses of tokens, or what goes to the next stage."""
        found: Tensor = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
        )
        return found

    def labels(self, name: str, shape: tuple[int, ...], value_as_block: bool = False) -> Tensor:
        """Return the oracle's blocks of a parameter under the preset ``paper``."""
        numel = torch.Size(shape).numel()
        is_norm = "norm" in name or ".ln_p" in f".{name}"
        if len(shape) == 1 and is_norm and name.endswith("weight"):
            return torch.zeros(shape, dtype=torch.int64)
        if len(shape) == 1 or name.endswith((*self.elementwise, "router.weight")):
            return torch.arange(numel).reshape(shape)
        head = next((h for n, h in self.heads.items() if name.endswith(n)), ())
        rows = _rows(shape[0], head, value_as_block)
        return rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()

    def job_of(self, name: str, job: Job) -> Job:
        """Return the job with the sizes of the module that holds a parameter."""
        return job

    def parts(self, name: str) -> tuple[int, ...] | None:
        """Return the rows of each projection in a fused weight, ``None`` if it is a single one."""
        return next((sizes for end, sizes in self.fused.items() if name.endswith(end)), None)


def _rows(count: int, head: tuple[tuple[int, bool], ...], value_as_block: bool) -> Tensor:
    """Return a label for each of ``count`` rows: heads one after the other, or each row its own."""
    if not head:
        return torch.arange(count)
    labels: list[int] = []
    while len(labels) < count:
        for rows, one_block in head:
            start = max(labels, default=0) + 1
            if value_as_block and not one_block:
                labels += [0] * rows
            else:
                labels += [start] * rows if one_block else list(range(start, start + rows))
    assert len(labels) == count
    return torch.unique(torch.tensor(labels), return_inverse=True)[1]


class LatentAttention(Family):
    """DeepSeek without experts: latent Query, Key and Value."""

    # qk_head_dim 6 and qk_pos_emb_head_dim 4; v_head_dim 8.
    heads: ClassVar = {
        "linear_q_up_proj.weight": ((6 + 4, True),),
        "linear_q_proj.weight": ((6 + 4, True),),
        "linear_kv_up_proj.weight": ((6, True), (8, False)),
    }

    def config_class(self) -> Any:
        from megatron.core.transformer.transformer_config import MLATransformerConfig

        return MLATransformerConfig

    def layers(self, spec: Any, config: Any) -> Any:
        from megatron.core.tensor_parallel import (
            gather_from_tensor_model_parallel_region,
            scatter_to_sequence_parallel_region,
        )
        from megatron.core.transformer.dot_product_attention import DotProductAttention
        from megatron.core.transformer.multi_latent_attention import MLASelfAttention

        class CoreAttention(DotProductAttention):
            """Megatron's, which refuses to be told sizes of heads although it can do without."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                kwargs = {k: v for k, v in kwargs.items() if k not in ("k_channels", "v_channels")}
                super().__init__(*args, **kwargs)

        class Attention(MLASelfAttention):
            """Megatron's, whose gradient of the common rotary Key misses the heads of other ranks.

            With its local layers it gathers that Key over tensor-parallel ranks, but does not sum
            its gradient. Without sequence parallelism it also sums a whole gradient of
            ``q_layernorm`` over them, which no layer can mend.
            """

            def _qkv_down_projection(self, hidden_states: Tensor) -> Any:
                query, rest = super()._qkv_down_projection(hidden_states)
                if self.config.sequence_parallel:
                    rest = gather_from_tensor_model_parallel_region(rest)
                    rest = scatter_to_sequence_parallel_region(rest)
                return query, rest

        for layer in getattr(spec, "layer_specs", [spec]):
            layer.submodules.self_attention.module = Attention
            layer.submodules.self_attention.submodules.core_attention = CoreAttention
        return spec


class Adapters(Family):
    """GPT with a low-rank adapter beside the fused Query, Key and Value, as Megatron-Bridge's."""

    def layers(self, spec: Any, config: Any) -> Any:
        from megatron.core.tensor_parallel import ColumnParallelLinear

        class Adapter(torch.nn.Module):
            def __init__(self, inner: int, outer: int, **options: Any) -> None:
                super().__init__()
                options |= {"bias": False}
                self.linear_in = ColumnParallelLinear(
                    inner, 4, **(options | {"gather_output": True})
                )
                self.linear_out = ColumnParallelLinear(4, outer, **options)

            def forward(self, x: Tensor) -> Tensor:
                return self.linear_out(self.linear_in(x)[0])[0]

        class Adapted(torch.nn.Module):
            def __init__(self, inner: int, outer: int, **options: Any) -> None:
                super().__init__()
                self.to_wrap = ColumnParallelLinear(inner, outer, **options)
                self.adapter = Adapter(inner, outer, **options)

            def forward(self, x: Tensor) -> Any:
                output, bias = self.to_wrap(x)
                return output + self.adapter(x), bias

        spec.submodules.self_attention.submodules.linear_qkv = Adapted
        return spec


class Hybrid(Family):
    """Nemotron-H: Mamba, attention and MLP layers in one stack."""

    # d_inner 64 (heads 4 of size 16), 2 groups with a state of 8: z, x, B, C, dt.
    fused: ClassVar = {
        "in_proj.weight": (64, 64, 16, 16, 4),
        "conv1d_weight": (64, 16, 16),
        "conv1d_bias": (64, 16, 16),
    }
    heads: ClassVar = {"linear_qkv.weight": ((8, True), (8, True), (8, True), *[(1, True)] * 8)}
    elementwise = ("conv1d_weight",)
    #: Kinds of layers: Mamba, attention, MLP.
    pattern = "M*-"

    def build(self, config: Any, job: Job, **stage: Any) -> Any:
        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.hybrid import hybrid_block
        from megatron.core.models.hybrid.hybrid_model import HybridModel
        from megatron.core.ssm import mamba_mixer
        from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
        from megatron.core.ssm.mlp_layer import MLPLayer
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer import spec_utils, torch_norm
        from megatron.core.transformer.transformer_layer import (
            TransformerLayer,
            TransformerLayerSubmodules,
        )

        norm = torch_norm.WrappedTorchNorm
        hybrid_block.TENorm = norm
        mamba_mixer.HAVE_MAMBA_SSM = True
        mamba_mixer.ExtendedRMSNorm = _group_norm_class()
        mamba_mixer.mamba_split_conv1d_scan_combined = state_space_scan
        layer = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
        attention = spec_utils.ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=layer.self_attention,
                self_attn_bda=get_bias_dropout_add,
            ),
        )
        mlp = spec_utils.ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=norm, mlp=layer.mlp, mlp_bda=get_bias_dropout_add
            ),
        )
        mixer = spec_utils.ModuleSpec(
            module=mamba_mixer.MambaMixer,
            submodules=mamba_mixer.MambaMixerSubmodules(
                in_proj=ColumnParallelLinear, out_proj=RowParallelLinear
            ),
        )
        mamba = spec_utils.ModuleSpec(
            module=MambaLayer,
            submodules=MambaLayerSubmodules(norm=norm, mixer=mixer, mamba_bda=get_bias_dropout_add),
        )
        stack = spec_utils.ModuleSpec(
            module=hybrid_block.HybridStack,
            submodules=hybrid_block.HybridStackSubmodules(
                mamba_layer=mamba, attention_layer=attention, mlp_layer=mlp
            ),
        )
        return HybridModel(
            config=config,
            hybrid_stack_spec=stack,
            vocab_size=job.vocab,
            max_sequence_length=job.sequence,
            hybrid_layer_pattern=self.pattern,
            position_embedding_type="none",
            **stage,
        )


def _group_norm_class() -> Any:
    """Return a stand-in for the norm of Mamba's mixer, with its state dict."""
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    class GroupNorm(torch.nn.Module):
        def __init__(self, size: int, *, eps: float, group_size: int, dtype: Any, **_: Any) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))
            self.eps, self.group_size = eps, group_size

        def forward(self, x: Tensor) -> Tensor:
            grouped = x.unflatten(-1, (-1, self.group_size))
            return (
                functional.rms_norm(grouped, (self.group_size,), eps=self.eps).flatten(-2)
                * self.weight
            )

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
        ) -> Any:
            return make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True),
                prefix,
                {"weight": 0},
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )

    return GroupNorm


def state_space_scan(
    zx: Tensor,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    *,
    D: Tensor,
    headdim: int,
    ngroups: int,
    **_: Any,
) -> Tensor:
    """Compute what Mamba's fused kernel does: convolution, scan over time, gate.

    The scan is written as an attention: each time sees the earlier ones, decayed.
    """
    length, width = zx.shape[1:]
    heads = len(a)
    inner = heads * headdim
    state = (width - 2 * inner - heads) // (2 * ngroups)
    z, x, dt = zx.split([inner, inner + 2 * ngroups * state, heads], dim=-1)
    x = functional.conv1d(
        x.transpose(1, 2), weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight)
    )
    x, b, c = (
        functional.silu(x[..., :length])
        .transpose(1, 2)
        .to(a.dtype)
        .split([inner, ngroups * state, ngroups * state], dim=-1)
    )
    dt = functional.softplus(dt + dt_bias)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (
        t.unflatten(-1, (ngroups, state)).repeat_interleave(heads // ngroups, dim=2) for t in (b, c)
    )
    log_decay = (dt * a).cumsum(dim=1)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)[..., None]
    decay = (log_decay[:, :, None] - log_decay[:, None]).masked_fill(later, -torch.inf).exp()
    scores = torch.einsum("bthn,bshn->btsh", c, b) * decay * dt[:, None]
    outputs = torch.einsum("btsh,bshp->bthp", scores, x) + D[:, None] * x
    return (outputs.flatten(2) * functional.silu(z)).to(z.dtype)


class GatedDelta(Family):
    """Qwen3-Next without experts: a gated delta net in place of attention."""

    # 2 Query and Key heads of size 4, 4 Value heads of size 8: query, key, value, z, beta, alpha.
    fused: ClassVar = {"in_proj.weight": (8, 8, 32, 32, 4, 4), "conv1d.weight": (8, 8, 32)}
    elementwise = ("conv1d.weight",)

    def layers(self, spec: Any, config: Any) -> Any:
        from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules, common
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer import spec_utils, torch_norm

        common.HAVE_FLA = True
        common.l2norm = functools.partial(functional.normalize, dim=-1)
        spec.submodules.self_attention = spec_utils.ModuleSpec(
            module=GatedDeltaNet,
            submodules=GatedDeltaNetSubmodules(
                in_proj=ColumnParallelLinear,
                out_norm=torch_norm.WrappedTorchNorm,
                out_proj=RowParallelLinear,
            ),
        )
        return spec


class Bert(Family):
    """BERT: learned positions and token types, a head for words and one for pairs of sentences."""

    heads: ClassVar = {"linear_qkv.weight": ((8, True), (8, True), (8, False))}

    def build(self, config: Any, job: Job, **stage: Any) -> Any:
        from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
        from megatron.core.models.bert.bert_model import BertModel

        return BertModel(
            config=config,
            num_tokentypes=2,
            transformer_layer_spec=bert_layer_local_spec,
            vocab_size=job.vocab,
            max_sequence_length=job.sequence,
            share_embeddings_and_output_weights=job.tied,
            **stage,
        )

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["tokens"]
        words, pair = model(tokens, torch.ones_like(tokens), tokens % 2, lm_labels=batch["labels"])
        found: Tensor = words.mean() + functional.cross_entropy(pair, tokens[:, 0] % 2)
        return found


class T5(Family):
    """T5: encoder, decoder, cross attention, relative positions."""

    heads: ClassVar = {
        "linear_qkv.weight": ((8, True), (8, True), (8, False)),
        "linear_q.weight": ((8, True),),
        "linear_kv.weight": ((8, True), (8, False)),
    }

    def build(self, config: Any, job: Job, **stage: Any) -> Any:
        from megatron.core.models.T5 import t5_spec
        from megatron.core.models.T5.t5_model import T5Model

        return T5Model(
            config=config,
            encoder_config=config,
            transformer_encoder_layer_spec=t5_spec.get_t5_encoder_with_local_block_spec(job.layers),
            transformer_decoder_layer_spec=t5_spec.get_t5_decoder_with_local_block_spec(job.layers),
            vocab_size=job.vocab,
            max_sequence_length=job.sequence,
            share_embeddings_and_output_weights=job.tied,
            **stage,
        )

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        tokens, mask = batch["tokens"], batch["attention_mask"]
        everything = torch.zeros_like(mask)
        found: Tensor = model(
            tokens, tokens.flip(1), everything, mask, everything, lm_labels=batch["labels"]
        )
        return found


def image_of(tokens: Tensor) -> Tensor:
    """Return an image for each sequence, shape ``(batch, 3, 8, 8)``."""
    return torch.sin(tokens[:, :3].float()[:, :, None, None] + torch.arange(64.0).view(8, 8))


class VisionTransformer(Family):
    """CLIP's vision model with a loss of its own."""

    heads: ClassVar = {"linear_qkv.weight": ((8, True), (8, True), (8, False))}
    elementwise = ("class_token",)

    def build(self, config: Any, job: Job, **stage: Any) -> Any:
        from megatron.core.models.vision.clip_vit_model import CLIPViTModel
        from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        return CLIPViTModel(
            config,
            get_vit_layer_with_local_spec(),
            ln_pre_impl=WrappedTorchNorm,
            ln_post_impl=WrappedTorchNorm,
            patch_dim=4,
            img_h=8,
            img_w=8,
        )

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        features: Tensor = model(image_of(batch["tokens"]))
        wanted = torch.sin(batch["tokens"][:, :1] + torch.arange(1.0 * features[0].numel()))
        return (features - wanted.view(features.shape)).square()


class Llava(Family):
    """LLaVA: CLIP's vision model, a projector, a language model; each has sizes of its own."""

    vision: ClassVar = {
        "hidden": 24, "heads": 4, "groups": 4, "ffn": 40, "swiglu": False, "bias": True,
        "config_args": {},
    }  # fmt: skip
    # Vision: 4 heads of size 6. Language: 4 heads of size 8, two of which share a Key and a Value.
    heads: ClassVar = {
        **{
            f"vision_model.decoder.layers.{layer}.self_attention.linear_qkv.weight": (
                *[(6, True)] * 2,
                (6, False),
            )
            for layer in range(2)
        },
        "linear_qkv.weight": (*[(8, True)] * 3, (8, False)),
    }
    elementwise = ("class_token",)
    # An image takes the place of one token, and has four patches.
    patches = 4

    def job_of(self, name: str, job: Job) -> Job:
        if name.startswith("language_model"):
            return job
        return replace(job, **self.vision)

    def build(self, config: Any, job: Job, **stage: Any) -> Any:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.multimodal import llava_model
        from megatron.core.models.vision.clip_vit_model import CLIPViTModel
        from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.enums import ModelType
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        # Megatron's default norm before the layers is Transformer Engine's.
        llava_model.CLIPViTModel = functools.partial(CLIPViTModel, ln_pre_impl=WrappedTorchNorm)
        vision = replace(
            config,
            hidden_size=self.vision["hidden"],
            num_attention_heads=self.vision["heads"],
            num_query_groups=self.vision["groups"],
            kv_channels=None,
            ffn_hidden_size=self.vision["ffn"],
            normalization="LayerNorm",
            gated_linear_unit=False,
            activation_func=functional.gelu,
            add_bias_linear=True,
            sequence_parallel=False,
            pipeline_model_parallel_size=1,
        )
        vision.vision_model_type = "clip"
        model = llava_model.LLaVAModel(
            language_transformer_config=config,
            language_transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
            language_vocab_size=job.vocab,
            language_max_sequence_length=job.sequence,
            vision_transformer_config=vision,
            vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
            drop_vision_class_token=True,
            vision_projection_config=replace(vision, hidden_size=job.hidden),
            vision_projection_layer_spec=MLPSubmodules(
                linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
            ),
            share_embeddings_and_output_weights=job.tied,
            language_position_embedding_type="rope",
            add_encoder=stage["pre_process"],
            img_h=8,
            img_w=8,
            patch_dim=4,
            **stage,
        )
        model.model_type = ModelType.encoder_or_decoder  # as Megatron's training loop does
        return model

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        text = slice(None, 1 - self.patches)
        tokens, labels = batch["tokens"][:, text].clone(), batch["labels"][:, text].clone()
        images = image_of(tokens)
        tokens[:, 0] = -200  # the token that stands for an image
        output, mask = model(
            images,
            tokens,
            batch["position_ids"][:, text],
            batch["attention_mask"],
            labels=labels,
            loss_mask=torch.ones_like(labels, dtype=torch.float32),
            num_image_tiles=torch.ones(len(tokens), dtype=torch.int),
        )
        found: Tensor = output if mask is None else output * mask
        return found


class Heterogeneous(Family):
    """Llama-Nemotron: heads, widths and kinds of layers differ; see ``HETEROGENEOUS``."""

    # Of 8 heads of size 8, two share a Key and a Value in layer 0, all of them in layer 1.
    heads: ClassVar = {
        f"layers.{layer}.self_attention.linear_qkv.weight": (
            *[(8, True)] * (queries + 1),
            *[(1, True)] * 8,
        )
        for layer, queries in ((0, 2), (1, 8))
    }

    def config_class(self) -> Any:
        from megatron.core.transformer.heterogeneous import heterogeneous_config

        return heterogeneous_config.HeterogeneousTransformerConfig

    def build(self, config: Any, job: Job, **stage: Any) -> Any:
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
            get_gpt_heterogeneous_layer_spec,
        )

        return GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_heterogeneous_layer_spec(config),
            vocab_size=job.vocab,
            max_sequence_length=job.sequence,
            share_embeddings_and_output_weights=job.tied,
            position_embedding_type="rope",
            **stage,
        )


FAMILIES: dict[str, Family] = {
    "adapters": Adapters(),
    "latent": LatentAttention(),
    "hybrid": Hybrid(),
    "delta": GatedDelta(),
    "bert": Bert(),
    "t5": T5(),
    "vision": VisionTransformer(),
    "llava": Llava(),
    "heterogeneous": Heterogeneous(),
}

LATENT = {
    "multi_latent_attention": True,
    "kv_channels": 8,  # the size of a Value head, for Megatron's local attention
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "rope_type": "rope",
}
HYBRID = {
    "mamba_state_dim": 8,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "is_hybrid_model": True,
}
DELTA = {
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 1,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "deterministic_mode": True,
}
#: Groups and widths of their own, linear layers in place of attention or MLP, and none at all.
HETEROGENEOUS = {
    "heterogeneous_layers_config_encoded_json": json.dumps(
        {
            "block_configs": [
                {"attention": {"num_query_groups": 4}, "mlp": {"ffn_hidden_size": 96}},
                {
                    "attention": {"num_query_groups": 1},
                    "mlp": {"ffn_hidden_size": None, "replace_with_linear": True},
                },
                {
                    "attention": {"num_query_groups": None, "replace_with_linear": True},
                    "mlp": {"ffn_hidden_size": None, "no_op": True},
                },
                {
                    "attention": {"num_query_groups": None, "no_op": True},
                    "mlp": {"ffn_hidden_size": 48},
                },
            ]
        }
    )
}
