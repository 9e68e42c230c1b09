"""What one run is: a model's size, an optimizer, a learning rate, a length, a seed.

Imports ``config`` of the package only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_adam_mini.config import PRESETS

#: AdamW, and each preset of Adam-mini.
OPTIMIZERS = ("adamw", *PRESETS)

#: How Adam-mini stores its state beside bfloat16 weights -> its options. ``nudged``: another
#: initial value in the last bits, to see by how much runs drift apart for no reason at all.
STORAGES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, nudged": {"nudged": True},
    "bf16 m, nearest": {"exp_avg_dtype": "bf16"},
    "bf16 m, stochastic": {"exp_avg_dtype": "bf16", "stochastic_rounding": True},
    "fp8 m": {"exp_avg_dtype": "fp8"},
    "remainders": {"param_remainders": True},
    "lean": {"lean": True},
    "fp8 m, remainders": {"exp_avg_dtype": "fp8", "param_remainders": True},
}

CORPORA = ("source", "docstrings")


def label(optimizer: str) -> str:
    """Return the name of an optimizer in pictures and tables."""
    return "AdamW" if optimizer == "adamw" else f"Adam-mini, {optimizer}"


@dataclass(frozen=True)
class Size:
    """A Llama-shaped model and its batches.

    Attributes:
        layers, hidden, ffn, heads, groups: of the model; groups are heads of Key and Value.
        sequence: tokens of a sample.
        batch: samples of a step.
        vocabulary: numbers of tokens; 257 are bytes and an end of document.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    sequence: int = 128
    batch: int = 8
    vocabulary: int = 257


#: Four that train on a CPU, and the shapes of the paper's 39M and 67M, which have these numbers of
#: parameters with its 32,000 tokens; with its sequences, and about its batches.
#: Source: examples/llama of github.com/zyushun/Adam-mini.
SIZES = {
    "toy": Size(layers=1, hidden=16, ffn=32, heads=2, groups=1, sequence=16, batch=2),
    "0.04M": Size(layers=2, hidden=32, ffn=96, heads=2, groups=1),
    "0.13M": Size(layers=2, hidden=64, ffn=192, heads=4, groups=2),
    "0.38M": Size(layers=3, hidden=96, ffn=288, heads=4, groups=2),
    "0.85M": Size(layers=4, hidden=128, ffn=384, heads=4, groups=2),
    "5M": Size(layers=6, hidden=256, ffn=768, heads=4, groups=4, sequence=512, batch=64),
    "39M": Size(8, 384, 1024, heads=6, groups=6, sequence=512, batch=192, vocabulary=32000),
    "67M": Size(10, 512, 1536, heads=8, groups=8, sequence=512, batch=192, vocabulary=32000),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of one run; equal settings are the same run.

    Attributes:
        optimizer: ``adamw`` or a preset of Adam-mini.
        size: a key of ``SIZES``.
        corpus: one of ``CORPORA``, or the path of a file of tokens; see ``corpora``.
        lr: the highest learning rate.
        warmup: steps of linear warm-up from 0; then the rate falls linearly to 0.
        steps: length of the run.
        seed: of initial weights and of batches, which are the same for all optimizers.
        beta2: of v. beta1 is 0.9, eps 1e-8, weight decay 0.1 (none for norms), clipping at 1.0.
        rules: names of parameters and their rule, before the preset's.
        value_as_block: one block for Value of a layer.
        device: ``cpu``: float32; ``cuda``: bfloat16 products, float32 weights.
        storage: a key of ``STORAGES``: the optimizer of Megatron runs, with bfloat16 weights;
            empty: torch's and the stand-alone one, with float32 weights.
        trainer: ``torch``: plain PyTorch and the stand-alone optimizer; ``megatron``: see ``twin``.
    """

    optimizer: str
    size: str
    lr: float
    warmup: int
    steps: int
    seed: int
    corpus: str = "source"
    beta2: float = 0.95
    rules: tuple[tuple[str, str], ...] = ()
    value_as_block: bool = False
    device: str = "cpu"
    storage: str = ""
    trainer: str = "torch"

    def to_json(self) -> dict[str, Any]:
        """Return what a line of the log says of this run."""
        return asdict(self) | {"rules": [list(rule) for rule in self.rules]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Run:
        """Return the run of a line of the log."""
        return cls(**values | {"rules": tuple((name, rule) for name, rule in values["rules"])})

    def describe(self) -> str:
        """Return a short text for a progress bar."""
        storage = f" ({self.storage})" if self.storage else ""
        return (
            f"{self.size} {self.optimizer}{storage} lr {self.lr:g} steps {self.steps} seed "
            f"{self.seed}"
        )
