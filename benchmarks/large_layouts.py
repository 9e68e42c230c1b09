"""Large models on large layouts: the ranks that ``plan_scale`` plans and ``step_tables`` times."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.estimate.models import MODELS, Model
from megatron_adam_mini.estimate.parallel import Parallel

_EMBEDDING_AND_LOSS = {
    "account_for_embedding_in_pipeline_split": True,
    "account_for_loss_in_pipeline_split": True,
}
_MODELS = {
    **MODELS,
    # One Key and one Value head: with TP 8 most Query and Key heads are on two ranks.
    "llama-3-405b-mqa": replace(MODELS["llama-3-405b"], num_query_groups=1),
    "deepseek-v3-like-mtp": replace(MODELS["deepseek-v3-like"], mtp_num_layers=1),
}
_PIPELINES: dict[str, dict[int, dict[str, Any]]] = {
    # 126 layers: as published, the first and the last stage have one layer less.
    "llama-3-405b": {1: {}, 4: _EMBEDDING_AND_LOSS, 16: _EMBEDDING_AND_LOSS},
    # 61 layers; the first three are dense.
    "deepseek-v3-like": {
        1: {},
        4: {"decoder_first_pipeline_num_layers": 16},
        16: {"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 2},
    },
    "llama-2-7b": {1: {}},
    "llama-3-8b": {1: {}},
}


@dataclass(frozen=True)
class Case:
    """One line of a table: a model, its layout, options of Adam-mini."""

    name: str
    parallel: Parallel
    options: AdamMiniConfig = field(default_factory=AdamMiniConfig)
    remark: str = ""
    distributed_optimizer: bool = True

    @property
    def model(self) -> Model:
        """The model of that name."""
        return _MODELS[self.name]

    @property
    def stage(self) -> int:
        """The pipeline stage whose ranks are planned."""
        if self.model.mtp_num_layers is not None:
            return self.parallel.pp - 1
        return 0 if self.parallel.pp == 1 or self.parallel.overlap_grad_reduce else 1


def parallel_of(name: str, tp: int, pp: int, dp: int, **more: Any) -> Parallel:
    """Return a layout; experts are spread over up to 64 ranks."""
    experts = {}
    if name.startswith("deepseek"):
        experts = {
            "expert_tensor_parallel_size": 1,
            "expert_model_parallel_size": min(64, tp * dp),
        }
    return Parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        **experts,
        **_PIPELINES[name][pp],
        **more,
    )


def layout_of(parallel: Parallel) -> str:
    """Return the sizes of a layout."""
    ep = parallel.expert_model_parallel_size
    sizes = f"{parallel.tp} x {parallel.pp} x {parallel.data_parallel_size}"
    return sizes + (f" ({ep})" if ep > 1 else "")
