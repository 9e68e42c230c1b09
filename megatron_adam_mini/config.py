"""The options of Adam-mini: partition into blocks, storage of state, kernels, reports.

Imports the standard library only, so launchers and offline tools can read it without torch.
Data flow: command line or ``OptimizerConfig`` -> **AdamMiniConfig** -> partition -> layout -> step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Tables of rules by role; see ``partition.rule_for``.
PRESETS = ("paper", "row", "row-column", "slim", "first", "tensor")

#: Presets with one second moment per column of Value.
BY_COLUMNS = ("row-column", "slim")

#: Rules that a user may set for parameters by name.
RULES = ("row", "column", "head", "tensor", "element")

#: How m may be stored; Megatron's names.
EXP_AVG_DTYPES = ("fp32", "bf16", "fp8")

#: What others store m as, and this package stores instead.
_NEAREST = {
    "fp16": "bf16, which has as many bytes, and small values of m that float16 would drop",
    "int8": "fp8, which has as many bits, and needs no scales in memory",
}

#: What ``lean`` stands for: the fewest bytes that are recommended; docs/memory.md says why.
LEAN: dict[str, Any] = {
    "exp_avg_dtype": "bf16",
    "stochastic_rounding": True,
    "param_remainders": True,
}
#: The same for weights that are not bfloat16, in the words of an error.
LEAN_WITHOUT_REMAINDERS = "--exp-avg-dtype bf16 --adam-mini-stochastic-rounding"

BACKENDS = ("auto", "reference", "cpu", "triton")

#: How state is stored in checkpoints; see ``mcore/checkpoint``.
CHECKPOINT_FORMATS = ("model_space", "buckets")


@dataclass(frozen=True, kw_only=True)
class AdamMiniConfig:
    """Options of Adam-mini that are not options of Adam.

    Args:
        preset: ``"paper"`` (default): one block per head of Query and Key, one per row of Value,
            projections, MLP, embedding and output. ``"row"``: the same with one per row of Query
            and Key. ``"row-column"``: the same with one per column (input) of Value and attention
            projection. ``"slim"``: SlimAdam's table, as ``"row-column"`` with one per column of the
            MLP, too, and one per element of norms. ``"first"``: one block per head of Query and
            Key, one second moment per element of embedding and output, one block per tensor
            elsewhere. ``"tensor"``: one block per tensor (Query, Key and Value are one each).
        value_as_block: make Value of one layer one block instead of one per row; not with the
            presets ``"row"``, ``"row-column"`` and ``"slim"``.
        full_v: ``fnmatch`` patterns of parameter names that keep one second moment per element.
        rules: ``(pattern, rule)`` pairs that override the preset, first match wins;
            rule is one of ``row``, ``column``, ``head``, ``tensor``, ``element``. ``full_v`` comes
            first.
        backend: kernels to use: ``auto``, ``reference`` (plain torch), ``cpu`` (C++) or
            ``triton`` (GPU).
        exp_avg_dtype: how m is stored: ``fp32`` (default), ``bf16`` or ``fp8`` (E4M3 relative to
            v, see ``rounding``; always rounded stochastically).
        stochastic_rounding: round a bfloat16 m stochastically instead of to the nearest.
        param_remainders: store only the lower 16 bits of the float32 main parameters; the upper
            ones are the bfloat16 model weights. Training is the same, bit for bit.
        lean: the smallest state that is recommended; sets the three options above to ``bf16``,
            ``True`` and ``True``. Needs bfloat16 weights.
        single_phase: read each gradient once per step instead of twice. Possible if nothing needs
            the gradient norm (no clipping, no loss scale); the norm is then not reported, and a
            non-finite gradient does not skip the step, nor do squares that overflow float32.
        overlap_block_sums: take the sums of squares of each bucket on a stream of their own as soon
            as it is reduced, while the backward pass runs on. The training is the same, bit for
            bit.
        manifest: path of a JSON file to which rank 0 writes the partition; ``None``: none.
        convert_partition: when a checkpoint has finer blocks, average its v over this run's
            (exact) instead of refusing it.
        checkpoint_format: how checkpoints store the state: ``model_space`` (default), which loads
            under any parallel layout, or ``buckets``: flat buckets of the distributed optimizer,
            which load under another data-parallel size only.
        check_files: before a load, read the whole checkpoint once (all ranks together) and check
            sizes and checksums.
        log_updates_interval: iterations of Megatron's training loop from one measurement of
            updates and v, for its logs, to the next; 0 (default): none.
        log_heterogeneity: the same for how unlike v is within the blocks that rules would make of
            parameters with one second moment per element.

    Raises:
        ValueError: a value is not allowed; the message names it and the allowed ones.

    Source: Zhang et al., arXiv:2406.16793, Algorithms 1 to 3.
    """

    preset: str = "paper"
    value_as_block: bool = False
    full_v: tuple[str, ...] = ()
    rules: tuple[tuple[str, str], ...] = ()
    backend: str = "auto"
    exp_avg_dtype: str = "fp32"
    stochastic_rounding: bool = False
    param_remainders: bool = False
    lean: bool = False
    single_phase: bool = False
    overlap_block_sums: bool = False
    manifest: str | None = None
    convert_partition: bool = False
    checkpoint_format: str = "model_space"
    check_files: bool = True
    log_updates_interval: int = 0
    log_heterogeneity: int = 0

    def __post_init__(self) -> None:
        """Normalise sequences to tuples and check every value."""
        given: object = self.full_v
        if isinstance(given, str):
            raise TypeError(
                f"Adam-mini full_v={self.full_v!r} is one string; give a sequence of patterns, "
                f"such as ({self.full_v!r},)."
            )
        object.__setattr__(self, "full_v", tuple(self.full_v))
        object.__setattr__(self, "rules", tuple((str(p), str(r)) for p, r in self.rules))
        _one_of("preset", self.preset, PRESETS)
        if self.value_as_block and self.preset in ("row", *BY_COLUMNS):
            part = "column" if self.preset in BY_COLUMNS else "row"
            raise ValueError(
                f"Adam-mini value_as_block=True has no meaning with preset={self.preset!r}, where "
                f"each {part} of Value is a block; drop one of them, or use preset='paper'."
            )
        _one_of("backend", self.backend, BACKENDS)
        nearest = _NEAREST.get(self.exp_avg_dtype)
        hint = (
            f" Nearest to {self.exp_avg_dtype} (--exp-avg-dtype) is {nearest}." if nearest else ""
        )
        _one_of("exp_avg_dtype", self.exp_avg_dtype, EXP_AVG_DTYPES, hint)
        _one_of("checkpoint_format", self.checkpoint_format, CHECKPOINT_FORMATS)
        if self.lean:
            self._make_lean()
        if self.exp_avg_dtype == "fp8":
            object.__setattr__(self, "stochastic_rounding", True)
        if self.stochastic_rounding and self.exp_avg_dtype == "fp32":
            raise ValueError(
                "Adam-mini stochastic_rounding=True has nothing to round with "
                "exp_avg_dtype='fp32'; give exp_avg_dtype='bf16' (--exp-avg-dtype bf16) too, or "
                "drop it."
            )
        for name in ("log_updates_interval", "log_heterogeneity"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"Adam-mini {name}={getattr(self, name)} is not allowed; it must be a number "
                    "of iterations, or 0: never."
                )
        for pattern, rule in self.rules:
            if rule not in RULES:
                raise ValueError(
                    f"Adam-mini rule {rule!r} for pattern {pattern!r} is not known; "
                    f"allowed: {', '.join(RULES)}."
                )

    def _make_lean(self) -> None:
        if self.exp_avg_dtype not in ("fp32", LEAN["exp_avg_dtype"]):
            raise ValueError(
                f"Adam-mini lean=True stores m as {LEAN['exp_avg_dtype']}, but "
                f"exp_avg_dtype={self.exp_avg_dtype!r} (--exp-avg-dtype {self.exp_avg_dtype}) was "
                "given, too. Drop one of them; what else --adam-mini-lean selects is "
                "--adam-mini-param-remainders and --adam-mini-stochastic-rounding."
            )
        for name, value in LEAN.items():
            object.__setattr__(self, name, value)

    def overrides(self) -> tuple[tuple[str, str], ...]:
        """Return all ``(pattern, rule)`` pairs in the order of precedence."""
        return tuple((pattern, "element") for pattern in self.full_v) + self.rules

    def storage_fields(self) -> dict[str, Any]:
        """Return how state is stored in memory; what it stands for is the same."""
        return {name: getattr(self, name) for name in LEAN}

    def step_fields(self) -> dict[str, Any]:
        """Return what else must be equal on all ranks: how they step, what they save and log."""
        names = (
            "single_phase",
            "overlap_block_sums",
            "checkpoint_format",
            "log_updates_interval",
            "log_heterogeneity",
        )
        return self.storage_fields() | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """How much state lies in host memory, and how it is updated there.

    Args:
        fraction: of this rank's elements; their main parameters, m and v per element lie there.
        overlap: copy on streams of their own, while the device updates the rest.
        pin_grads, pin_weights: pin the memory through which gradients and weights are copied.

    Raises:
        ValueError: the fraction is not allowed.
    """

    fraction: float = 0.0
    overlap: bool = False
    pin_grads: bool = True
    pin_weights: bool = True

    def __post_init__(self) -> None:
        """Check the fraction."""
        if not 0.0 <= self.fraction <= 1.0:
            raise ValueError(
                f"--optimizer-offload-fraction {self.fraction} is not allowed; it must be in "
                "[0, 1]: the part of the optimizer state that lies in host memory."
            )


def check_adam_values(
    *, lr: float | None, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """Check the hyper-parameters that Adam-mini shares with AdamW.

    Raises:
        ValueError: a value is outside its range; the message has name, value and range.
    """
    if lr is not None and not lr >= 0.0:
        raise ValueError(f"lr={lr} is not allowed; it must be >= 0.")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta{index + 1}={beta} is not allowed; it must be in [0, 1).")
    # With eps = 0 the row of a token that was never seen (m = v = 0) would become 0 / 0.
    if not eps > 0.0:
        raise ValueError(f"eps={eps} is not allowed; it must be > 0 (the usual value is 1e-8).")
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay={weight_decay} is not allowed; it must be >= 0.")


def _one_of(name: str, value: str, allowed: tuple[str, ...], hint: str = "") -> None:
    if value not in allowed:
        raise ValueError(
            f"Adam-mini {name}={value!r} is not known; allowed: {', '.join(allowed)}.{hint}"
        )
