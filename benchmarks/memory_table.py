"""Bytes of the rank that holds most, for each way to store the state, over data-parallel sizes.

``python -m benchmarks.memory_table`` writes the dated result; half a minute. Numbers are those of
``megatron-adam-mini memory``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.report import heading, write
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.estimate.memory import FORMATS, Planner, largest_rank
from megatron_adam_mini.estimate.models import MODELS
from megatron_adam_mini.estimate.parallel import Parallel

_GB = 10**9


@dataclass(frozen=True)
class Case:
    """A model, and its layouts beside data parallelism: sizes of ``data_parallel_size``."""

    model: str
    layout: Parallel
    data: tuple[int, ...]

    @property
    def title(self) -> str:
        """Model and layout."""
        one, given = self.layout, [f"TP {self.layout.tp}", f"PP {self.layout.pp}"]
        if one.expert_model_parallel_size > 1:
            given += [f"EP {one.expert_model_parallel_size}", f"ETP {one.etp}"]
        return f"{self.model}, {', '.join(given)}"


CASES = (
    Case("llama-3-8b", Parallel(), (1, 2, 8, 64)),
    Case(
        "mixtral-8x7b-like",
        Parallel(
            tensor_model_parallel_size=4,
            expert_model_parallel_size=8,
            expert_tensor_parallel_size=1,
            data_parallel_size=2,
        ),
        (2, 4, 16, 64),
    ),
    Case(
        "deepseek-v3-like",
        Parallel(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=16,
            expert_model_parallel_size=64,
            expert_tensor_parallel_size=1,
            decoder_first_pipeline_num_layers=3,
            decoder_last_pipeline_num_layers=2,
            data_parallel_size=32,
        ),
        (32, 64, 256),
    ),
)


def rows(case: Case) -> Iterator[tuple[str, list[int]]]:
    """Yield each way to store the state and its bytes, by data-parallel size and gradients.

    Gradients are float32, then bf16, for each size.
    """
    planner = Planner(MODELS[case.model], case.layout, AdamMiniConfig())
    stages = [
        planner.stages(replace(case.layout, data_parallel_size=size, grad_reduce_in_bf16=bf16))
        for size in case.data
        for bf16 in (False, True)
    ]
    for form in FORMATS.values():
        yield form.label, [largest_rank(one, form)["total"] for one in stages]


def table(case: Case) -> str:
    """Return the Markdown table of a model."""
    planner = Planner(MODELS[case.model], case.layout, AdamMiniConfig())
    sizes = []
    for size in case.data:
        layout = replace(case.layout, data_parallel_size=size)
        shared = f"d = {layout.dense_shards}"
        if case.layout.expert_model_parallel_size > 1:
            shared += f", experts {layout.expert_shards}"
        sizes += [shared, f"{shared}, bf16 gradients"]
    lines: list[list[Any]] = [["", *sizes], ["---"] * (len(sizes) + 1)]
    lines += [[label, *(f"{n / _GB:.3f}" for n in found)] for label, found in rows(case)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"## {case.title}\n\n{planner.num_parameters():,} parameters.\n\n{text}\n"


def main() -> None:
    """Write the result."""
    text = (
        "GB (10^9 bytes) of weights (bf16), gradients and state on the rank that holds most; "
        "d ranks share the\nstate of a parameter. Gradients are float32, or bf16 "
        "(`--grad-reduce-in-bf16`). Adam-mini's rows are, byte for byte,\nwhat real runs of small "
        "models allocate (`tests/test_memory.py`), Adam's first row, too. The second is\n"
        "Transformer Engine's, by formula; FlashAdamW's is its authors' count of 3 bytes of "
        "state\n(arXiv:2602.23349), sharded as Megatron shards Adam's, which nobody has run.\n"
    )
    parts = [heading("Memory of each rank", "benchmarks.memory_table"), text, *map(table, CASES)]
    print(write("memory", "\n".join(parts)))


if __name__ == "__main__":
    main()
