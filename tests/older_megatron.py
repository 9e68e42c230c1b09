"""What the example script calls and older releases of Megatron lack, so that tests run it on them.

Since 0.19, ``pretrain`` builds GPT from a config that is made of arguments. Before, it takes a
function that builds the model, and before 0.18 it parses the arguments itself. ``install`` defines
the newer names, in terms of the older ones, where they are missing.
"""

from __future__ import annotations

import inspect
import multiprocessing
import sys
import types
from functools import cache
from importlib.machinery import PathFinder
from typing import Any


def install() -> None:
    """Define what is missing; in 0.19 and later, nothing."""
    from megatron.training import argument_utils

    if not hasattr(argument_utils, "gpt_config_from_args"):
        install_core()
        _install_training()


def install_core() -> None:
    """Define what is missing in megatron.core, which may be all that there is."""
    from megatron.core import utils
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(filesystem_async, "get_write_results_queue"):  # before 0.17
        write = TorchDistSaveShardedStrategy.__init__
        write.__defaults__ = ("torch_dist", 1, *write.__defaults__)
        filesystem_async.get_write_results_queue = cache(
            lambda mode="spawn": multiprocessing.get_context(mode).Manager().Queue()
        )
        filesystem_async._get_write_results_queue = lambda: (
            filesystem_async.get_write_results_queue()
        )
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 defines it with Transformer Engine only
        moe_utils.te_general_gemm = None
    split = utils.get_batch_on_this_cp_rank
    if "is_hybrid_cp" not in inspect.signature(split).parameters:
        utils.get_batch_on_this_cp_rank = lambda batch, is_hybrid_cp, cp_group: split(
            batch, cp_group
        )


def _install_training() -> None:
    import megatron.training
    from megatron.training import argument_utils, arguments

    _define_tokenizer()
    argument_utils.gpt_config_from_args = lambda args: None
    pretrain = megatron.training.pretrain
    if hasattr(arguments, "parse_and_validate_args"):
        megatron.training.pretrain = lambda config, datasets, kind, forward: pretrain(
            config, datasets, build_gpt, kind, forward
        )
        return

    providers: list[Any] = []

    def parse(extra_args_provider: Any) -> Any:
        providers.append(extra_args_provider)
        return arguments.parse_args(extra_args_provider)

    arguments.parse_and_validate_args = parse
    argument_utils.pretrain_cfg_container_from_args = lambda args, model: None
    megatron.training.pretrain = lambda _, datasets, kind, forward: pretrain(
        datasets, build_gpt, kind, forward, extra_args_provider=providers.pop()
    )


def _define_tokenizer() -> None:
    """Before 0.17, the function that builds a tokenizer is in megatron.training."""
    from megatron.core import tokenizers

    package = "megatron.core.tokenizers.utils"
    # On the disk: what stands in sys.modules may have been put there by an earlier call.
    if PathFinder.find_spec(package, tokenizers.__path__) is not None:
        return
    from megatron.training.tokenizer import build_tokenizer

    module = types.ModuleType(f"{package}.build_tokenizer")
    module.build_tokenizer = build_tokenizer  # type: ignore[attr-defined]
    sys.modules |= {package: types.ModuleType(package), module.__name__: module}


def build_gpt(pre_process: bool = True, post_process: bool = True, **where: Any) -> Any:
    """Build a chunk of GPT as the scripts of these releases do, of Megatron's own layers."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = where.pop("config", None) or core_transformer_config_from_args(args)
    vp_stage = where.get("vp_stage")
    spec: Any = gpt_layer_specs.get_gpt_layer_local_spec(
        qk_layernorm=args.qk_layernorm, normalization=args.normalization
    )
    if args.num_experts:
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(
            config, False, normalization=args.normalization, vp_stage=vp_stage
        )
    mtp_spec = None
    if args.mtp_num_layers:
        mtp_spec = gpt_layer_specs.get_gpt_mtp_block_spec(config, spec, False, vp_stage=vp_stage)
    return GPTModel(
        config,
        spec,
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        mtp_block_spec=mtp_spec,
        **where,
    )
