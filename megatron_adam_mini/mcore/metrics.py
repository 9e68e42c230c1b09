"""What Megatron's logs say of Adam-mini: own metrics, and numbers that Megatron computes for Adam.

Imports ``compat`` and, when it writes, megatron.training; holds weak references to the optimizers
that were built, and logs metrics of the last one. ``docs/logs.md`` lists all that is logged.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from megatron_adam_mini.mcore.compat import argument_reader
from megatron_adam_mini.mcore.noise_report import noise_metrics, noise_of_model, noise_table
from megatron_adam_mini.update_sizes import measure_updates

if TYPE_CHECKING:
    from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer

#: In the order in which they were built.
_observed: list[weakref.ref[AdamMiniOptimizer]] = []


def observe(optimizer: AdamMiniOptimizer) -> None:
    """Log this optimizer's metrics from now on."""
    _observed[:] = [one for one in _observed if one() is not None] + [weakref.ref(optimizer)]


def _last() -> AdamMiniOptimizer | None:
    return _observed[-1]() if _observed else None


def _trainer_of(model: Any) -> AdamMiniOptimizer | None:
    """Return the optimizer that was built last for parameters of one or several model chunks."""
    chunks = model if isinstance(model, list) else [model]
    params = {id(param) for chunk in chunks for param in chunk.parameters()}
    for held in reversed(_observed):
        optimizer = held()
        if optimizer and any(id(param) in params for param in optimizer.model_params):
            return optimizer
    return None


def metrics_of(
    optimizer: AdamMiniOptimizer, *, updates: bool = False, heterogeneity: bool = False
) -> dict[str, float]:
    """Return the metrics of this rank (Megatron logs those of the last one).

    ``adam-mini/state-bytes/KIND``: bytes of optimizer state that the rank holds.
    ``adam-mini/added-collectives-per-step`` and ``adam-mini/added-bytes-per-step/GROUP``: what
    completing cut blocks adds to the communication of any distributed optimizer.

    Args:
        optimizer: Adam-mini.
        updates: also :func:`update_metrics`, which all ranks must call.
        heterogeneity: also ``noise_report.noise_metrics``, likewise.
    """
    added = optimizer.communication_per_step()
    found: dict[str, float] = {
        f"adam-mini/state-bytes/{k}": n for k, n in optimizer.state_bytes().items()
    }
    found["adam-mini/added-collectives-per-step"] = added["collectives"]
    for group, num_bytes in added["by_group"].items():
        found[f"adam-mini/added-bytes-per-step/{group.replace(' ', '-')}"] = num_bytes
    if updates:
        found |= update_metrics(optimizer)
    if heterogeneity:
        found |= noise_metrics(noise_of_model(optimizer))
    return found


def update_metrics(optimizer: AdamMiniOptimizer) -> dict[str, float]:
    """Return what a step did to the whole model; all ranks must call it after the step.

    By role of the parameters: ``adam-mini/update-to-weight/ROLE``, ``adam-mini/v-min/ROLE`` and
    ``adam-mini/v-max/ROLE``, see ``update_sizes``. Empty after a step that was skipped.
    """
    with optimizer.optimizer.left_where_it_is():
        measured = measure_updates(optimizer.inner, optimizer.optimizer.attach())
    found = {}
    for role, size in measured.items():
        if size.ratio is not None:
            found[f"adam-mini/update-to-weight/{role}"] = size.ratio
        found[f"adam-mini/v-min/{role}"] = size.v_min
        found[f"adam-mini/v-max/{role}"] = size.v_max
    return found


def wrap_training_log(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron's ``training_log`` with Adam-mini's metrics after its own."""
    iteration_of = argument_reader(original, "iteration")

    @functools.wraps(original)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        optimizer = _last()
        if optimizer is not None:
            _write(optimizer, int(iteration_of(*args, **kwargs)))
        return result

    return training_log


def wrap_params_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron's ``calc_params_l2_norm``, right also where its way to main parameters fails.

    With remainders there are no main parameters to read, and the weights of other ranks are old
    where their gather overlaps the next forward pass. Megatron reads them in device memory only.
    """
    model_of = argument_reader(original, "model")

    @functools.wraps(original)
    def calc_params_l2_norm(*args: Any, **kwargs: Any) -> Any:
        optimizer = _trainer_of(model_of(*args, **kwargs))
        if optimizer is None or not (
            optimizer.inner.config.param_remainders
            or optimizer.inner.on_host
            or _num_copies(optimizer) > 1
        ):
            return original(*args, **kwargs)
        with _norms_as_main_params(optimizer):
            return original(*args, **kwargs)

    return calc_params_l2_norm


@contextmanager
def _norms_as_main_params(optimizer: AdamMiniOptimizer) -> Iterator[None]:
    """Give 16-bit parameters the norm of their main shard as ``main_param``, for a while.

    Megatron adds up the squares of what it finds there, so the norm comes out the same without
    main parameters in memory. Megatron counts the shards of all optimizer instances; here each
    shard counts once.
    """
    pieces, parameters = optimizer.inner.plan.pieces, optimizer.model_params
    factor = _num_copies(optimizer) ** -0.5
    norms: dict[Any, Tensor] = {}
    with optimizer.optimizer.left_where_it_is():
        state = optimizer.optimizer.attach()
        for piece in pieces:
            norm = state.of(piece).norm(piece.window).view(1).to(optimizer.inner.device)
            norms[parameters[piece.parameter]] = norm * factor
    is_sharded = bool(optimizer.ddp_config.use_distributed_optimizer)
    changed = [vars(param) for param in parameters if param.dtype != torch.float32]
    names = "main_param", "main_param_sharded"
    kept = [{name: held[name] for name in names if name in held} for held in changed]
    try:
        for param in parameters:
            if param.dtype != torch.float32:
                vars(param).update(main_param=norms.get(param), main_param_sharded=is_sharded)
        yield
    finally:
        for held, before in zip(changed, kept, strict=True):
            for name in names:
                held.pop(name, None)
            held.update(before)


def _num_copies(optimizer: AdamMiniOptimizer) -> int:
    """Return how many optimizer instances share out the same main parameters."""
    if not optimizer.ddp_config.use_distributed_optimizer:
        return 1
    return int(optimizer.ddp_config.num_distributed_optimizer_instances)


def wrap_state_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron's ``compute_weight_and_optimizer_memory`` less what Adam-mini saves."""

    @functools.wraps(original)
    def compute_weight_and_optimizer_memory(*args: Any, **kwargs: Any) -> Any:
        optimizer = _last()
        saved = 0 if optimizer is None else _saved_bytes(optimizer)
        return original(*args, **kwargs) - saved

    return compute_weight_and_optimizer_memory


def _saved_bytes(optimizer: AdamMiniOptimizer) -> int:
    """Return how many bytes less this rank's state takes than Adam's, which is all float32.

    On the device: what lies in host memory takes nothing there. Tables and vectors are not state.
    """
    adam = sum(
        piece.window.numel * (8 if param.dtype == torch.float32 else 12)
        for piece in optimizer.inner.plan.pieces
        for param in (optimizer.model_params[piece.parameter],)
    )
    own = optimizer.state_bytes()
    for kind in ("launch_tables", "step_vectors"):
        own.pop(kind, None)
    return adam - sum(num for kind, num in own.items() if not kind.startswith("host_"))


def write_metrics(
    optimizer: AdamMiniOptimizer, iteration: int, log_interval: int, writer: Any, wandb_writer: Any
) -> None:
    """Write what is due; all ranks must call it and measure, those with a writer write.

    The table of heterogeneity is printed by rank 0.

    Args:
        optimizer: Adam-mini.
        iteration: number of the iteration that ended, from 1.
        log_interval: iterations from one writing of the constant metrics to the next.
        writer: of TensorBoard, ``None`` if this rank has none.
        wandb_writer: module or run of Weights & Biases, likewise.
    """
    config = optimizer.inner.config
    found: dict[str, float] = {}
    if _is_due(config.log_updates_interval, iteration):
        found |= update_metrics(optimizer)
    if _is_due(config.log_heterogeneity, iteration):
        found |= _report_noise(optimizer, iteration)
    if not (writer or wandb_writer):
        return
    if iteration % log_interval == 0:
        found |= metrics_of(optimizer)
    if writer:
        for name, value in found.items():
            writer.add_scalar(name, value, iteration)
    if wandb_writer and found:
        wandb_writer.log(found, iteration)


def _is_due(interval: int, iteration: int) -> bool:
    return interval > 0 and iteration % interval == 0


def _report_noise(optimizer: AdamMiniOptimizer, iteration: int) -> dict[str, float]:
    noise = noise_of_model(optimizer)
    if noise and distributed.get_rank() == 0:
        print(noise_table(noise, optimizer.manifest, iteration), flush=True)  # noqa: T201
    return noise_metrics(noise)


def _write(optimizer: AdamMiniOptimizer, iteration: int) -> None:
    from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

    write_metrics(
        optimizer,
        iteration,
        get_args().tensorboard_log_interval,
        get_tensorboard_writer(),
        get_wandb_writer(),
    )
