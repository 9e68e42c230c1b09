"""A Megatron checkpoint of Adam-mini -> weights and state for the public package.

The result is the file that a user of ``adam_mini.Adam_mini`` 1.1.1 with Hugging Face's Llama would
save: ``{"model": ..., "optimizer": ..., "names": ...}``. Weights are the float32 main parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.checkpoint.errors import UnreadableError
from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.convert.llama import HuggingFaceParameter, parts_of, read_llama, sort_key_of
from megatron_adam_mini.convert.mini_state import MiniState
from megatron_adam_mini.convert.parameters import StoredParameter
from megatron_adam_mini.convert.progress import bytes_bar
from megatron_adam_mini.convert.public_state import entry_of
from megatron_adam_mini.plan.manifest import are_unions, state_key
from megatron_adam_mini.plan.partition import IntArray, ParameterBlocks

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def public_content(source: Checkpoint) -> dict[str, Any]:
    """Return the content of the file, with weights and m of the whole model in memory.

    Raises:
        UnreadableError: the model is not a Llama, or the package does not have such blocks.
        CorruptError: damaged or incomplete state.
    """
    llama = read_llama(source)
    state, heads, blocks = llama.state, llama.heads, llama.blocks
    weights: dict[str, Tensor] = {}
    states: dict[str, dict[str, Any]] = {}
    total = sum(source.tensors[state_key("param", p.key)].num_bytes for p in state.parameters)
    with bytes_bar(total, "Adam-mini -> public") as progress:
        for parameter in state.parameters:
            main = source.read(state_key("param", parameter.key))
            exp_avg = source.read(state_key("exp_avg", parameter.key))
            v, labels = _v_of_rows(source, state, parameter, blocks[parameter.key])
            for part in parts_of(parameter.key, parameter.shape[0], heads):
                rows = _without_padding(part, llama.args)
                place = torch.from_numpy(rows)
                vmean = _vmean(part.name, v[rows], labels[rows], parameter, heads.head_dim)
                weights[part.name] = main[place]
                states[part.name] = entry_of(part.name, exp_avg[place], vmean, state.step)
            progress.update(main.nbytes)
    names = sorted(weights, key=sort_key_of)
    model = {name: weights[name] for name in names}
    if _OUTPUT not in model and _EMBEDDING in model:  # tied: one parameter under two names
        model[_OUTPUT] = model[_EMBEDDING]
    optimizer = {
        "state": {number: states[name] for number, name in enumerate(names)},
        "param_groups": [
            {**_options(state, name), "name": name, "params": [number]}
            for number, name in enumerate(names)
        ],
    }
    return {"model": model, "optimizer": optimizer, "names": names}


def _v_of_rows(
    source: Checkpoint, state: MiniState, parameter: StoredParameter, blocks: ParameterBlocks
) -> tuple[IntArray, IntArray]:
    """Return v of each row (its mean, if every element has its own) and the row's block."""
    if parameter.key in state.elementwise:
        values = source.read(state_key("v_element", parameter.key)).double()
        rows = values.reshape(len(values), -1).mean(dim=1)
        return rows.numpy(), np.arange(len(values))
    rows = source.read(state_key("v_row", parameter.key))
    assert blocks.pattern is not None  # v is per row, see mini_state
    return rows.double().numpy(), blocks.pattern.block_of_rows()


def _vmean(
    name: str, v: Any, labels: IntArray, parameter: StoredParameter, head_dim: int
) -> Tensor:
    """Return the package's v of one parameter, float32, shape ``(blocks,)``.

    Raises:
        UnreadableError: a block of the checkpoint spans several of the package's.
    """
    if "q_proj" in name or "k_proj" in name:
        public = np.arange(len(v)) // head_dim
    elif len(parameter.shape) == 1 or ("v_proj" in name and len(np.unique(labels)) == 1):
        public = np.zeros(len(v), dtype=np.int64)  # Value: the package with wv_names emptied
    else:
        public = np.arange(len(v))
    if not are_unions(public, labels):
        raise UnreadableError(
            f"{name!r}: the checkpoint has {len(np.unique(labels))} blocks where the public "
            f"package has {int(public.max()) + 1}, and one of them spans several of the package's. "
            "Only state of the preset 'paper' fits."
        )
    means = np.bincount(public, weights=v) / np.bincount(public)
    return torch.from_numpy(means.astype(np.float32))


def _without_padding(part: HuggingFaceParameter, args: Any) -> IntArray:
    size = getattr(args, "vocab_size", None)
    if part.name in (_EMBEDDING, _OUTPUT) and size:
        return part.rows[:size]
    return part.rows


def _options(state: MiniState, name: str) -> dict[str, Any]:
    """Return the options of one parameter's group: norms have no weight decay."""
    decays = [float(group["weight_decay"]) for group in state.param_groups]
    beta1, beta2 = state.param_groups[0]["betas"]
    return {
        "weight_decay": 0.0 if "norm" in name else max(decays),
        "lr": float(state.param_groups[0]["lr"]),
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(state.param_groups[0]["eps"]),
    }
