"""Adam-mini in the place of Megatron's distributed optimizer, for all model chunks of a rank.

Imports megatron.core and ``optimizer``. It reads gradients where the reduce-scatter left them, and
writes weights where the parameter all-gather reads them. What is no part of the step stands in the
classes below it: ``gathered_state``, ``saved_state``, ``distributed_names``, ``rank_optimizer``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from megatron_adam_mini.decision import Decision, Outcome
from megatron_adam_mini.early_buffers import NO_EARLY_BUFFERS, EarlyBuffers
from megatron_adam_mini.mcore import compat
from megatron_adam_mini.mcore.gathered_state import GatheredState
from megatron_adam_mini.mcore.slices import numbers_of_chunk
from megatron_adam_mini.wide_sums import WideSums

logger = logging.getLogger(__name__)

#: The pass that takes block sums, norm and clipping factor. Megatron prints the timers that it
#: knows by name, and no others.
_SUMS_TIMER = "optimizer-clip-main-grad"


class AdamMiniOptimizer(GatheredState):
    """Adam-mini behind Megatron's optimizer interface.

    Built by ``factory.build_optimizer``; users get it from Megatron's ``get_megatron_optimizer``,
    as the only member of a chain.

    Args:
        args, kwargs: of ``RankOptimizer``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Sums of squares in float32 or, too, in float64, and the inverse loss scale.
        self._sums: tuple[Tensor, WideSums | None, Tensor | None] | None = None
        self._decision: Decision | None = None
        self._clip_grad = 0.0
        self._warned: set[str] = set()
        self._early = NO_EARLY_BUFFERS
        if self.config.overlap_param_gather_with_optimizer_step:
            self._early = self._first_chunk()

    def warm_up(self) -> bool:
        """Compile the kernels of a step and make their tables; see :meth:`AdamMini.warm_up`."""
        return self.inner.warm_up(inv_scale=self._inv_scale(), clip_grad=self.config.clip_grad)

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, int | None]:
        """Take one step; all ranks must call it.

        Clipping, and whether to skip the step, are computed on the device; the host waits for it
        only at the end, for the values to return.

        Returns:
            ``(updated, grad_norm, num_zeros_in_grad)``; the norm is ``None`` in a single-phase
            step, which does not know it. A step with a non-finite gradient on any rank is skipped
            everywhere: ``(False, None, None)``, with no state changed. If all are finite, but v
            would not fit into float32: ``(False, grad_norm, num_zeros_in_grad)``.
        """
        self._sums = self._decision = None
        decision = self._decide_at_once()
        num_zeros = self._num_zeros()  # before the update: decay that is not decoupled enters them
        self._update(decision)
        if decision.in_doubt:
            decision = self._decide_again(self._decide)
            if decision.read().updated:
                self._update(decision)
        outcome = self.inner.finish(decision)
        self._tell_scaler(outcome)
        self._report(decision)
        if outcome.found_inf:
            return False, None, None
        if not outcome.updated and decision.problem is None:
            logger.info(
                "skipping a step: grad_norm %s exceeds grad_norm_skip_threshold %s",
                outcome.grad_norm,
                compat.grad_norm_skip_threshold(self.config),
            )
        return outcome.updated, outcome.grad_norm, num_zeros

    def _decide_at_once(self) -> Decision:
        """Compute all sums and decide, without waiting for the device."""
        with self._timer(_SUMS_TIMER):
            if self.inner.config.single_phase:
                self.inner.sum_squares_of_cut_blocks()
                return Decision()
            return self._decide(self.inner.sum_squares())

    def _decide(self, stats: Tensor, wide: WideSums | None = None) -> Decision:
        return self.inner.decide(
            stats,
            wide,
            inv_scale=self._inv_scale(),
            clip_grad=self.config.clip_grad,
            skip_threshold=compat.grad_norm_skip_threshold(self.config),
        )

    def _num_zeros(self) -> int | None:
        if not self.config.log_num_zeros_in_grad:
            return None
        with self._timer("optimizer-count-zeros"):
            return self.count_zeros()

    def _decide_again(self, decide: Callable[[Tensor, WideSums | None], Decision]) -> Decision:
        """Decide by new sums, where the first were in doubt; all ranks must call it.

        Those that were taken before the step may be of gradients that have changed since: then
        float32 comes first, and float64 if that is in doubt, too.
        """
        overlapped = self.inner.overlapped_sums
        if overlapped is not None:
            overlapped.look_for_changes()
            with self._timer(_SUMS_TIMER):
                stats = self.inner.sum_squares()
            decision = decide(stats, None)
            if not decision.in_doubt:
                return decision
        return decide(*self._wide_sums())

    def _wide_sums(self) -> tuple[Tensor, WideSums]:
        with self._timer(_SUMS_TIMER):
            return self.inner.sum_squares_in_float64()

    # The same phase by phase, for callers that drive a MegatronOptimizer themselves.

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Compute all sums; return whether any gradient of any rank is not finite.

        ``.grad`` of each main shard is its gradient from here on, for callers that change it.
        """
        if self.inner.config.single_phase:
            raise RuntimeError(
                "A single-phase step has no phases to drive one by one; call step(), or drop "
                "--adam-mini-single-phase."
            )
        with self._timer(_SUMS_TIMER):
            # The loss scale of these gradients: the scaler changes it before they are used.
            self._sums = self.inner.sum_squares(), None, self._inv_scale()
        self._clip_grad = 0.0
        decision = self._decide_phase()
        self._lend_gradients()
        outcome = decision.read()
        self._tell_scaler(outcome)
        if outcome.found_inf:
            self._report(decision)
        return outcome.found_inf

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Return the norm of the model's gradient, without the loss scale, before clipping."""
        grad_norm = self._decided("get_grad_norm").read().grad_norm
        assert grad_norm is not None
        return grad_norm

    @torch.no_grad()
    def clip_grad_norm(self, clip_grad: float) -> float:
        """Set the clipping factor of the update, and return the norm before clipping.

        Gradients are never rewritten: after the step, ``main_grad`` is unclipped.
        """
        self._decided("clip_grad_norm")
        self._clip_grad = clip_grad
        self._decide_phase()
        return self.get_grad_norm()

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update state and weights, and start Megatron's parameter all-gather.

        Sums are taken again: the caller may have clipped the gradients of the main shards.
        """
        self._decided("step_with_ready_grads")
        assert self._sums is not None
        _, _, inv_scale = self._sums
        self._take_gradients_back()
        with self._timer(_SUMS_TIMER):
            self._sums = self.inner.sum_squares(), None, inv_scale
        decision = self._decide_phase()
        self._update(decision)
        self._sums = self._decision = None
        outcome = self.inner.finish(decision)
        self._report(decision)
        return outcome.updated

    def get_grads_for_grad_norm(self, grad_norm_group: str | None = None) -> list[Tensor]:
        """Return this rank's gradients that count in the norm, without the loss scale.

        Args:
            grad_norm_group: parameters with a norm of their own, which Adam-mini refuses: none.
        """
        if grad_norm_group is not None:
            return []
        inv_scale = self._inv_scale()
        grads = [
            self.inner.grad(piece)
            for piece in self.inner.plan.pieces
            if self.inner.plan.parameters[piece.parameter].info.in_norm
        ]
        return grads if inv_scale is None else [grad * inv_scale for grad in grads]

    def count_zeros(self) -> int:
        """Return the number of zeros in the model's gradients, each parameter counted once."""
        return self.inner.count_zeros()

    # What both share.

    def _decided(self, caller: str) -> Decision:
        if self._decision is None:
            raise RuntimeError(f"{caller} needs prepare_grads first: it takes the block sums.")
        return self._decision

    def _decide_phase(self) -> Decision:
        assert self._sums is not None
        first, first_wide, inv_scale = self._sums

        def decide(stats: Tensor, wide: WideSums | None) -> Decision:
            self._sums = stats, wide, inv_scale
            return self.inner.decide(stats, wide, inv_scale=inv_scale, clip_grad=self._clip_grad)

        decision = decide(first, first_wide)
        self._decision = self._decide_again(decide) if decision.in_doubt else decision
        return self._decision

    def _lend_gradients(self) -> None:
        """Let ``.grad`` of the main shards be their gradients, still with the loss scale.

        They are views of float32 gradients, and copies of others and for shards on the host. Shards
        that are 16-bit weights, completed by remainders, cannot have float32 gradients, and have
        none.
        """
        for shard, piece in zip(self.optimizer.shards, self.inner.plan.pieces, strict=True):
            if shard.dtype == torch.float32:
                shard.grad = self.inner.grad(piece).float().to(shard.device)

    def _take_gradients_back(self) -> None:
        for shard, piece in zip(self.optimizer.shards, self.inner.plan.pieces, strict=True):
            grad = self.inner.grad(piece)
            if shard.grad is not None and shard.grad.data_ptr() != grad.data_ptr():
                grad.copy_(shard.grad)

    def _inv_scale(self) -> Tensor | None:
        return None if self.grad_scaler is None else self.grad_scaler.inv_scale

    def _update(self, decision: Decision) -> None:
        """Update state and weights; start their all-gather unless the forward pass does that."""
        with self._timer("optimizer-inner-step"):
            self.inner.update(decision, self._early)
            if any(self._quantized) and decision.read().updated:
                self._quantize_weights()
        if self.ddp_config.use_distributed_optimizer and not (self.ddp_config.overlap_param_gather):
            with self._timer("params-all-gather"):
                for chunk in self.model_chunks:
                    chunk.start_param_sync()

    def _first_chunk(self) -> EarlyBuffers:
        """Return the buffers of the first model chunk, whose all-gather starts within the step.

        As Megatron's own optimizers, it tells the chunk that nobody else has to start it.
        """
        chunk = self.model_chunks[0]
        chunk.overlap_param_gather_with_optimizer_step = True
        return EarlyBuffers(
            numbers_of_chunk(self.inner.buffers, chunk),
            lambda: chunk.start_param_sync(force_dispatch=True),
        )

    def _tell_scaler(self, outcome: Outcome) -> None:
        if self.grad_scaler is not None:
            self.found_inf.fill_(outcome.found_inf)
            self.grad_scaler.update(outcome.found_inf)

    def _report(self, decision: Decision) -> None:
        """Log, once of each kind, what float32 cannot hold: on rank 0 and where it is."""
        outcome, wide, problem = decision.read(), decision.wide, decision.problem
        if wide is None or (outcome.found_inf and self.grad_scaler is not None):
            return  # with a loss scale, gradients that are not finite are nothing special
        if not (outcome.updated or outcome.found_inf or problem):
            return  # above the threshold of norms
        kind = "non-finite" if outcome.found_inf else problem or "float64"
        if kind in self._warned:
            return
        self._warned.add(kind)
        names = wide.non_finite_names() if outcome.found_inf else decision.names
        finite = f"gradients are finite (norm {outcome.grad_norm:.3g})"
        if outcome.updated:
            text = (
                f"{finite}, but sums of their squares overflow float32, or nearly: such steps take "
                "sums in float64, and longer (further ones are not logged)"
            )
        else:
            reason = "non-finite gradients" if outcome.found_inf else f"{finite}, but {problem}"
            text = (
                f"skipping a step: {reason}; optimizer state and weights are unchanged (further "
                "skipped steps are only counted in Megatron's log)"
            )
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            text += f". On this rank: {', '.join(names[:5])}{more}"
        if names or not distributed.is_initialized() or distributed.get_rank() == 0:
            logger.warning(text)
