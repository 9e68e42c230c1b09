"""Megatron's command line on a host without CUDA: the flags that a run needs.

Standard library only, so a launcher can import it before torch.
"""

from collections.abc import Sequence

__all__ = ["CPU_FLAGS", "with_cpu_flags"]

CPU_FLAGS: tuple[tuple[str, ...], ...] = (
    # Communication and layers that exist without CUDA.
    ("--distributed-backend", "gloo"),
    ("--transformer-impl", "local"),
    ("--attention-backend", "unfused"),
    ("--use-cpu-initialization",),
    # No kernels that are written in CUDA, or that torch.compile would have to build.
    ("--no-masked-softmax-fusion",),
    ("--no-bias-gelu-fusion",),
    ("--no-bias-swiglu-fusion",),
    ("--no-bias-dropout-fusion",),
    ("--no-rope-fusion",),
    ("--no-persist-layer-norm",),
    ("--no-gradient-accumulation-fusion",),
    # A loader process per rank would only compete with the ranks for the same cores.
    ("--num-workers", "0"),
)
"""Each flag with its value, in the order in which they are appended."""

_REQUIRED = frozenset({"--distributed-backend", "--transformer-impl"})
"""Flags for which no other value works; Megatron would fail late and without naming them."""


_NEED_CUDA = {
    "--use-persistent-ckpt-worker": (
        "its process selects a CUDA device, fails, and the run waits for it without end; save "
        "synchronously (Megatron's --async-save needs this worker)"
    ),
}
"""Flags that work with CUDA only, and why."""


def with_cpu_flags(arguments: Sequence[str]) -> list[str]:
    """Return ``arguments`` followed by every missing flag of ``CPU_FLAGS``.

    Flags in ``arguments`` keep their values (``--num-workers 2`` stays).

    Args:
        arguments: the training script's arguments, without the script's own name.

    Raises:
        ValueError: an argument selects something that needs CUDA; the message says what.
    """
    given: dict[str, str | None] = {}
    for position, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, has_value, value = argument.partition("=")
            following = arguments[position + 1] if position + 1 < len(arguments) else None
            given[name] = value if has_value else following

    for name, reason in _NEED_CUDA.items():
        if name in given:
            raise ValueError(f"{name} does not work on the CPU host: {reason}, or use a GPU")
    appended: list[str] = []
    for name, *values in CPU_FLAGS:
        if name not in given:
            appended += [name, *values]
        elif name in _REQUIRED and given[name] != values[0]:
            raise ValueError(
                f"{name} {given[name]} does not work on the CPU host, where only {name} "
                f"{values[0]} does; remove {name}, or run without --cpu-host"
            )
    return [*arguments, *appended]
