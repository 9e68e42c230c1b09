"""The script that ``twin`` starts: a run's weights and batches, in Megatron's training loop.

Runs under ``megatron_adam_mini.launch``. Forward step and loss are those of
``examples/pretrain_llama.py``; only where weights and samples come from differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import pretrain_llama
from evidence import corpora
from evidence.model import Llama
from evidence.settings import SIZES, Run
from evidence.training import VALIDATIONS, batch_generator, initial_model, validation_starts


class Samples(torch.utils.data.Dataset):
    """Samples in a fixed order, as Megatron's datasets return them."""

    def __init__(self, tokens: Tensor, labels: Tensor) -> None:
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample."""
        length = self.tokens.shape[1]
        return {
            "tokens": self.tokens[index],
            "labels": self.labels[index],
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
        }


def this_run() -> Run:
    """Return what the command line asks for."""
    return Run.from_json(json.loads(get_args().settings))


def provide_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Return the batches of the run, and its validation as often as it is validated."""
    run = this_run()
    size = SIZES[run.size]
    corpus = corpora.read(run.corpus)
    generator = batch_generator(run.seed)
    drawn = [
        corpora.draw(
            corpus.training, samples=size.batch, sequence=size.sequence, generator=generator
        )
        for _ in range(run.steps)
    ]
    training = Samples(*(torch.cat(part) for part in zip(*drawn, strict=True)))
    starts = validation_starts(corpus.validation, size).repeat(VALIDATIONS + 1)
    held_out = Samples(*corpora.at(corpus.validation, starts, sequence=size.sequence))
    return training, held_out, None


provide_datasets.is_distributed = True


def megatron_weights(model: Llama, groups: int) -> dict[str, Tensor]:
    """Return the weights of a model by Megatron's names, Query, Key and Value by groups."""
    found = {
        "embedding.word_embeddings.weight": model.embed_tokens.weight,
        "decoder.final_layernorm.weight": model.norm.weight,
        "output_layer.weight": model.lm_head.weight,
    }
    for number, layer in enumerate(model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        parts = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        by_group = torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1)
        found |= {
            f"decoder.layers.{number}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": layer.input_layernorm.weight,
                "self_attention.linear_qkv": by_group.flatten(0, 1),
                "self_attention.linear_proj": attention.o_proj.weight,
                "pre_mlp_layernorm": layer.post_attention_layernorm.weight,
                "mlp.linear_fc1": torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)),
                "mlp.linear_fc2": mlp.down_proj.weight,
            }.items()
        }
    return found


class ForwardStep:
    """The example's forward step; the first one writes the run's weights into the model.

    In float32 the model's weights are those that the optimizer updates, so nothing else has to know
    of it.
    """

    def __init__(self) -> None:
        self._is_first = True

    def __call__(self, data_iterator: Iterator[Any] | None, model: torch.nn.Module) -> Any:
        """Run a micro-batch; see ``pretrain_llama.forward_step``."""
        if self._is_first:
            self._is_first = False
            write_weights(get_attr_wrapped_model(model, "decoder", return_model_obj=True))
        return pretrain_llama.forward_step(data_iterator, model)


@torch.no_grad()
def write_weights(model: torch.nn.Module) -> None:
    """Give a model the initial weights of the run.

    Raises:
        ValueError: they are not of the same names and shapes.
    """
    assert parallel_state.get_tensor_model_parallel_world_size() == 1
    run = this_run()
    weights = megatron_weights(initial_model(SIZES[run.size], run.seed), SIZES[run.size].groups)
    own = dict(model.named_parameters())
    shapes = {name: weight.shape for name, weight in weights.items()}
    if shapes != {name: weight.shape for name, weight in own.items()}:
        raise ValueError(f"The run has weights {shapes}, Megatron's model {list(own)}.")
    for name, weight in own.items():
        weight.copy_(weights[name])


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this script's flag to Megatron's."""
    parser.add_argument("--settings", required=True, help="of the run, as JSON")
    return parser


def main() -> None:
    """Parse Megatron's flags and train."""
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        provide_datasets,
        ModelType.encoder_or_decoder,
        ForwardStep(),
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
