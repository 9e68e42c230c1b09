r"""Train a tiny Llama with Megatron-Bridge's own ``pretrain`` and Adam-mini, without a GPU.

    torchrun --nproc-per-node 2 tools/bridge_check.py FOLDER [--train-iters N] [--recipe YAML] ...

The rest are overrides in Hydra's language, such as ``optimizer.adam_mini_preset=first``.
Weights come from a Hugging Face checkpoint that the first run makes in FOLDER (with random values),
through Bridge's ``AutoBridge``; all else is Bridge's common recipe for pre-training with mock data.
A second run resumes from the checkpoint of the first. Prints losses and what the optimizer was.

Nothing of Bridge is changed. What this machine need not have stands in as empty modules:
Transformer Engine (only while Bridge defines adapters of its layers; layers are Megatron's own),
ModelOpt and the resiliency extension, of which this run uses nothing. Recipes of single models are
not imported, since each of them wants packages of its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any

from megatron_adam_mini import cpu_host

cpu_host.enable()


class _Nothing(type):
    """A class whose attributes are such classes, and which makes ``None``."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> None:
        return None


class _Empty(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 (a module's)
    __version__ = "2.10.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty modules for packages that are not installed."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the spec of an empty package, if it is one of these."""
        if name.startswith("nvidia_resiliency_ext.checkpointing"):
            return None  # optional, and asked for by Megatron
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        """Return the empty module."""
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing."""


def import_bridge() -> None:
    """Import what defines layers before Transformer Engine seems to be there, then Bridge."""
    importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    importlib.import_module("megatron.core.optimizer")
    sys.meta_path.append(StandIns("modelopt", "nvidia_resiliency_ext"))
    engine = StandIns("transformer_engine")
    sys.meta_path.append(engine)
    importlib.import_module("megatron.bridge.peft.lora_layers")
    sys.meta_path.remove(engine)
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    recipes = types.ModuleType("megatron.bridge.recipes")
    (folder,) = importlib.import_module("megatron.bridge").__path__
    recipes.__path__ = [f"{folder}/recipes"]
    sys.modules[recipes.__name__] = recipes


def make_hugging_face_model(folder: Path) -> None:
    """Write a Llama with random weights, as Hugging Face stores it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def recipe(folder: Path, train_iters: int) -> Any:
    """Return Bridge's common recipe, made small; its last line is the one that a user adds."""
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.bridge.recipes import common

    from megatron_adam_mini.mcore.bridge import AdamMiniOptimizerConfig

    cfg = common._pretrain_common()
    cfg.model = AutoBridge.from_hf_pretrained(str(folder / "hf")).to_megatron_provider()
    cfg.model.transformer_layer_spec = local_layer_spec
    cfg.model.seq_length = cfg.dataset.seq_length = 16
    cfg.model.gradient_accumulation_fusion = False
    cfg.model.apply_rope_fusion = False
    cfg.model.persist_layer_norm = False
    cfg.tokenizer.tokenizer_type = "NullTokenizer"
    cfg.tokenizer.vocab_size = 127
    cfg.tokenizer.use_tokenizer_vocab_size = False
    cfg.dist.distributed_backend = "gloo"
    cfg.train.train_iters, cfg.train.global_batch_size, cfg.train.micro_batch_size = (
        train_iters,
        8,
        2,
    )
    cfg.validation.eval_iters = 0
    cfg.scheduler.lr_warmup_iters, cfg.scheduler.lr_decay_iters = 2, 8
    cfg.logger.log_interval = 1
    cfg.logger.tensorboard_dir = str(folder / "tensorboard")
    cfg.checkpoint.save = cfg.checkpoint.load = str(folder / "checkpoints")
    cfg.checkpoint.save_interval = train_iters

    cfg.optimizer = AdamMiniOptimizerConfig.like(cfg.optimizer)
    return cfg


def main() -> None:
    """Run one training."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train-iters", type=int, default=4)
    parser.add_argument("--recipe", type=Path, help="take the optimizer from a run_config.yaml")
    options, overrides = parser.parse_known_args()

    import_bridge()
    import yaml
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
    from megatron.bridge.utils.instantiate_utils import instantiate

    from megatron_adam_mini.mcore.bridge import AdamMiniMetrics

    is_first = int(os.environ.get("RANK", "0")) == 0
    if not (options.folder / "hf").exists():
        if is_first:
            make_hugging_face_model(options.folder / "making")
            (options.folder / "making").rename(options.folder / "hf")
        while not (options.folder / "hf").exists():
            pass

    class Report(Callback):
        def on_train_start(self, context: Any) -> None:
            if is_first:
                (member,) = context.optimizer.chained_optimizers
                print("optimizer:", type(member).__name__, member.state_bytes(), flush=True)
                print("options:", member.inner.config, flush=True)
                print("step:", [group["step"] for group in member.param_groups], flush=True)

        def on_train_step_end(self, context: Any) -> None:
            if is_first:
                losses = {name: round(float(loss), 6) for name, loss in context.loss_dict.items()}
                rates = {group["lr"] for group in context.optimizer.param_groups}
                print("step:", losses, "norm", context.grad_norm, "lr", rates, flush=True)

    cfg = recipe(options.folder, options.train_iters)
    if options.recipe:
        cfg.optimizer = instantiate(yaml.safe_load(options.recipe.read_text())["optimizer"])
    cfg = process_config_with_overrides(cfg, cli_overrides=overrides)
    pretrain(cfg, forward_step, callbacks=[AdamMiniMetrics(), Report()])


if __name__ == "__main__":
    main()
