"""The process in which Megatron-LM's unit tests run: what is installed, imported and replaced.

Nothing in the tests is changed, and of Megatron only what this machine lacks:

* the CPU host answers for CUDA, gloo for NCCL, and ``torch.cuda.device_count()`` is the number of
  ranks, as on a machine with one GPU for each;
* Megatron's Adam is ``FusedAdam`` below, as if Apex were installed. The tests suppose it: torch's
  AdamW requires a learning rate and counts steps for each parameter;
* where tests ask for Transformer Engine's layers, they get Megatron's own ones;
* the process of a checkpoint writer's queue is forked, not spawned, which only saves time.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

from megatron_adam_mini import cpu_host

cpu_host.enable()

import megatron.core.optimizer  # noqa: E402
import megatron.training.training  # noqa: E402
import torch  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.optimizer import distrib_optimizer  # noqa: E402
from torch import distributed  # noqa: E402

import megatron_adam_mini  # noqa: E402
from megatron_adam_mini.plan import manifest  # noqa: E402

num_replaced = 0  # how many optimizers of this process are Adam-mini in Adam's place


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the interface of Apex's and Transformer Engine's: ``step`` is the group's."""

    def __init__(
        self,
        params: Any,
        lr: float | None = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable or not adam_w_mode:
            raise NotImplementedError("the test host has AdamW without CUDA graphs only")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            step = group["step"] = group.get("step", 0) + 1
            (beta1, beta2), lr = group["betas"], group["lr"]
            for param in group["params"]:
                if (grad := param.grad) is None:
                    continue
                state = self.state[param]
                exp_avg = state.setdefault("exp_avg", torch.zeros_like(param))
                exp_avg_sq = state.setdefault("exp_avg_sq", torch.zeros_like(param))
                param.mul_(1 - lr * group["weight_decay"])
                exp_avg.lerp_(grad, 1 - beta1)
                exp_avg_sq.lerp_(grad.square(), 1 - beta2)
                denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(group["eps"])
                param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def prepare(checkout: Path, world_size: int) -> None:
    """Make the checkout's tests importable in this process and in its forks.

    Args:
        checkout: of Megatron-LM; of the rest of it only what is not installed can be imported.
        world_size: number of ranks.
    """
    if Path(megatron.core.__file__ or "").is_relative_to(checkout):
        raise SystemExit("megatron.core is the checkout's; remove the checkout from PYTHONPATH")
    torch.set_num_threads(1)  # and no threads before the forks
    torch.cuda.device_count = lambda: world_size
    os.environ["WORLD_SIZE"] = str(world_size)
    for name in ("init_process_group", "new_group"):
        setattr(distributed, name, _with_gloo(getattr(distributed, name)))
    for module in (megatron.core.optimizer, distrib_optimizer):
        module.Adam = FusedAdam
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    filesystem_async.get_write_results_queue.__wrapped__.__defaults__ = ("fork",)

    _replace_transformer_engine()
    tests = types.ModuleType("tests")  # this project has a package of that name, too
    tests.__path__ = [str(checkout / "tests")]
    # Their conftest would download data sets, which the tests of optimizers do not read.
    download = types.ModuleType("tests.test_utils.python_scripts.download_unit_tests_dataset")
    download.download_and_extract_asset = lambda **_: False  # type: ignore[attr-defined]
    sys.modules.update({module.__name__: module for module in (tests, download)})
    sys.path.append(str(checkout))
    os.chdir(checkout)


def _replace_transformer_engine() -> None:
    known = inspect.signature(gpt_layer_specs.get_gpt_layer_local_submodules).parameters

    def local_spec(*args: Any, **kwargs: Any) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if name in known}
        return gpt_layer_specs.get_gpt_layer_local_spec(*args, **kwargs)

    gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec = local_spec
    gpt_layer_specs.TENorm = gpt_layer_specs.LNImpl
    # test_optimizer.py imports it, and skips what calls it.
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.fp8")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].fp8_autocast = None  # type: ignore[attr-defined]
    sys.modules.update(modules)


def _with_gloo(original: Any) -> Any:
    @functools.wraps(original)
    def make_group(*args: Any, **kwargs: Any) -> Any:
        args = tuple("gloo" if argument == "nccl" else argument for argument in args)
        kwargs = {name: "gloo" if value == "nccl" else value for name, value in kwargs.items()}
        return original(*args, **kwargs)

    return make_group


def put_adam_mini_in_adams_place() -> None:
    """Let ``get_megatron_optimizer`` and the command line say "adam_mini" for "adam"."""
    megatron_adam_mini.register()
    manifest.MAX_UNKNOWN_SHARE = 1.0  # weights of their toy models have any name
    original = megatron.core.optimizer.get_megatron_optimizer

    @functools.wraps(original)
    def get_megatron_optimizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        global num_replaced
        if config.optimizer == "adam":
            config.optimizer = "adam_mini"
        optimizer = original(config, *args, **kwargs)
        num_replaced += config.optimizer == "adam_mini"
        return optimizer

    for module in list(sys.modules.values()):  # others have imported it by its name
        if vars(module).get("get_megatron_optimizer") is original:
            module.get_megatron_optimizer = get_megatron_optimizer  # type: ignore[attr-defined]
    sys.argv += ["--optimizer", "adam_mini"]


def end_with_parent() -> None:
    """Let this process be killed at the end of the one that forked it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def become_rank(rank: int) -> None:
    """Initialize what Megatron's tests find initialized by an earlier one: some rely on it."""
    end_with_parent()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    utils = importlib.import_module("tests.unit_tests.test_utilities").Utils
    utils.rank = rank  # which it read from the environment when it was imported
    utils.initialize_distributed()
    utils.inited = False
