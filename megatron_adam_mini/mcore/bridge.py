"""Adam-mini for recipes of Megatron-Bridge: its optimizer's config, and a callback for its logs.

The only module that imports Megatron-Bridge; nothing of this package imports it. A recipe needs

    cfg.optimizer = AdamMiniOptimizerConfig.like(cfg.optimizer)

Data flow: recipe, YAML or Hydra overrides -> ``AdamMiniOptimizerConfig`` -> ``AdamMiniConfig``,
attached where ``factory`` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import OptimizerConfig
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from megatron.core.optimizer import get_megatron_optimizer

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.mcore.arguments import OPTIMIZER
from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer
from megatron_adam_mini.mcore.low_precision import dtype_name
from megatron_adam_mini.mcore.metrics import write_metrics
from megatron_adam_mini.mcore.registration import register

#: Fields of Adam-mini have the names of its flags. ``exp_avg_dtype`` is a field of Megatron's.
PREFIX = "adam_mini_"
OPTIONS = tuple(f.name for f in fields(AdamMiniConfig) if f.name != "exp_avg_dtype")

# Bridge makes only those classes from YAML whose package somebody has allowed.
register_allowed_target_prefix(__name__)


@dataclass
class AdamMiniOptimizerConfig(OptimizerConfig):  # type: ignore[misc]
    """Bridge's ``OptimizerConfig`` for Adam-mini; all fields survive YAML, overrides and copies.

    Args:
        optimizer: ``"adam_mini"``, and nothing else.
        adam_mini_*: the options of :class:`AdamMiniConfig`, where they are explained;
            m in bfloat16 is Megatron's ``exp_avg_dtype=torch.bfloat16``, in 8 bits ``torch.uint8``.
    """

    optimizer: str = OPTIMIZER
    adam_mini_preset: str = AdamMiniConfig.preset
    adam_mini_value_as_block: bool = AdamMiniConfig.value_as_block
    adam_mini_full_v: tuple[str, ...] = AdamMiniConfig.full_v
    adam_mini_rules: tuple[tuple[str, str], ...] = AdamMiniConfig.rules
    adam_mini_backend: str = AdamMiniConfig.backend
    adam_mini_stochastic_rounding: bool = AdamMiniConfig.stochastic_rounding
    adam_mini_param_remainders: bool = AdamMiniConfig.param_remainders
    adam_mini_lean: bool = AdamMiniConfig.lean
    adam_mini_single_phase: bool = AdamMiniConfig.single_phase
    adam_mini_overlap_block_sums: bool = AdamMiniConfig.overlap_block_sums
    adam_mini_manifest: str | None = AdamMiniConfig.manifest
    adam_mini_convert_partition: bool = AdamMiniConfig.convert_partition
    adam_mini_checkpoint_format: str = AdamMiniConfig.checkpoint_format
    adam_mini_check_files: bool = AdamMiniConfig.check_files
    adam_mini_log_updates_interval: int = AdamMiniConfig.log_updates_interval
    adam_mini_log_heterogeneity: int = AdamMiniConfig.log_heterogeneity

    @classmethod
    def like(cls, config: OptimizerConfig, **changes: Any) -> AdamMiniOptimizerConfig:
        """Return a config with the values of another, such as a recipe's, and some changes."""
        known = {field.name for field in fields(cls) if field.init}
        kept = {f.name: getattr(config, f.name) for f in fields(config) if f.name in known}
        return cls(**kept | {"optimizer": OPTIMIZER} | changes)

    def options(self) -> AdamMiniConfig:
        """Return the options of Adam-mini.

        Raises:
            ValueError: a value is not allowed.
        """
        if self.optimizer != OPTIMIZER:
            raise ValueError(
                f"AdamMiniOptimizerConfig has optimizer={self.optimizer!r}; allowed is "
                f"{OPTIMIZER!r}. For another optimizer, use Megatron-Bridge's OptimizerConfig."
            )
        given: Mapping[str, Any] = {name: getattr(self, PREFIX + name) for name in OPTIONS}
        return AdamMiniConfig(**given, exp_avg_dtype=dtype_name(self.exp_avg_dtype))

    def to_cfg_dict(self) -> dict[str, Any]:
        """Return what Bridge writes into YAML: all but timers, which it sets and cannot read."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "timers"}
        values["adam_mini_full_v"] = list(self.adam_mini_full_v)
        values["adam_mini_rules"] = [list(rule) for rule in self.adam_mini_rules]
        return {"_target_": f"{__name__}.{type(self).__qualname__}", **values}

    def finalize(self) -> None:
        """Check the values; Bridge calls it before it builds anything.

        Raises:
            ValueError: a value is not allowed.
            NotImplementedError: state cannot be stored as asked.
        """
        register()
        self.adam_mini = self.options()
        super().finalize()

    def provide(
        self,
        model_chunks: Any,
        config_overrides: Mapping[Any, Any] | None = None,
        use_gloo_process_groups: bool = True,
        pg_collection: Any = None,
    ) -> Any:
        """Build the optimizer; Bridge's ``setup_optimizer`` calls it.

        Args:
            model_chunks: chunks wrapped in megatron.core's ``DistributedDataParallel``.
            config_overrides: per-parameter overrides of learning rate and weight decay.
            use_gloo_process_groups: as Megatron's.
            pg_collection: process groups; default Megatron's global ones.

        Raises:
            NotImplementedError, ValueError, TypeError, RuntimeError: as ``build_optimizer``.
        """
        register()
        self.adam_mini = self.options()
        return get_megatron_optimizer(
            config=self,
            model_chunks=model_chunks,
            config_overrides=config_overrides,
            use_gloo_process_groups=use_gloo_process_groups,
            pg_collection=pg_collection,
        )


class AdamMiniMetrics(Callback):  # type: ignore[misc]
    """Write Adam-mini's metrics where Bridge writes its own: ``pretrain(..., callbacks=[...])``."""

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Write the metrics of this step, as often as Bridge does; it calls this on all ranks."""
        state = context.state
        for member in getattr(context.optimizer, "chained_optimizers", ()):
            if isinstance(member, AdamMiniOptimizer):
                write_metrics(
                    member,
                    state.train_state.step + 1,  # Bridge counts the step after this
                    state.cfg.logger.tensorboard_log_interval,
                    state.tensorboard_logger,
                    state.wandb_logger,
                )
