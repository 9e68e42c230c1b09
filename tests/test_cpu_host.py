"""The CPU host: what it answers, what it refuses, and that it leaves computation alone.

``enable`` changes a process for good, so every test runs a small program in a process of its own,
forked from one that has imported torch and nothing else.
"""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from megatron_adam_mini.cpu_host import CPU_FLAGS, with_cpu_flags
from tests.ranks import run_ranks

SERVER = """
import json, linecache, os, signal, sys, tempfile, traceback, warnings
import torch

torch.set_num_threads(1)
warnings.simplefilter("ignore")


def run(text):
    signal.alarm(100)
    linecache.cache["<program>"] = (len(text), None, text.splitlines(True), "<program>")
    try:
        exec(compile(text, "<program>", "exec"), {"__name__": "__main__"})
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


for line in sys.stdin:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = run(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        print(json.dumps([code, out.read().decode(), err.read().decode()]), flush=True)
"""


@dataclass
class Result:
    exit_code: int
    output: str
    errors: str


Run = Callable[[str], Result]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run_program(text: str) -> Result:
        print(json.dumps(textwrap.dedent(text)), file=server.stdin, flush=True)
        return Result(*json.loads(server.stdout.readline()))

    try:
        yield run_program
    finally:
        server.kill()
        server.communicate()


@pytest.fixture
def check(run: Run) -> Callable[[str], None]:
    def check_program(text: str) -> None:
        result = run(text)
        assert result.exit_code == 0, result.errors

    return check_program


Check = Callable[[str], None]

ENABLE = """
import torch
from megatron_adam_mini.cpu_host import enable, is_enabled
assert not is_enabled()
enable()
enable()
assert is_enabled()
"""


def test_answers_are_those_of_a_cpu(check: Check) -> None:
    check(
        ENABLE
        + """
import pickle, threading, time

# Devices.
assert torch.cuda.is_available() and torch.cuda.is_initialized()
assert torch.cuda.device_count() == 1
assert torch.cuda.get_device_capability() == (8, 0)
properties = torch.cuda.get_device_properties(0)
assert properties.major == 8 and properties.total_memory > 2**28
torch.cuda.set_device(3)
with torch.cuda.device(0):
    pass
assert not torch.accelerator.is_available()

# Streams and events.
side = torch.cuda.Stream()
assert torch.cuda.current_stream() is torch.cuda.default_stream()
with torch.cuda.stream(side):
    assert torch.cuda.current_stream() is side
    with torch.cuda.stream(None):
        assert torch.cuda.current_stream() is side
    event = side.record_event()
assert torch.cuda.current_stream() is torch.cuda.default_stream()
assert isinstance(event, torch.cuda.Event) and event.query()
torch.cuda.current_stream().wait_event(event)
first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
first.record(); time.sleep(0.01); last.record()
assert 9 < first.elapsed_time(last) < 5000
try:
    first.elapsed_time(event)
except RuntimeError as error:
    assert "enable_timing=True" in str(error)
else:
    raise AssertionError("an event without timing gave a time")

# Random state is the CPU's, also by the ways that Megatron's tracker takes.
torch.manual_seed(5)
state = torch.cuda.get_rng_state()
expected = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(3), expected)
torch.cuda.random.set_rng_state_all([state])
assert torch.equal(torch.rand(3), expected)
torch.cuda._lazy_call(
    lambda: torch.cuda.default_generators[torch.cuda.current_device()].set_state(state)
)
assert torch.equal(torch.rand(3), expected)
torch.cuda.manual_seed(5)
assert torch.equal(torch.rand(3), expected)

# Memory is the process's own.
before = torch.cuda.memory_allocated()
block = torch.ones(20_000_000)
assert torch.cuda.memory_allocated() - before > 60_000_000
assert torch.cuda.max_memory_allocated() >= before
assert torch.cuda.memory_stats()["allocated_bytes.all.current"] > 0
"""
    )


def test_tensors_meant_for_cuda_are_cpu_tensors(check: Check) -> None:
    check(
        ENABLE
        + """
device = torch.cuda.current_device()
for tensor in (
    torch.zeros(2, device="cuda"),
    torch.zeros(2, device="cuda:1"),
    torch.zeros(2, device=0),
    torch.zeros(2, device=device),
    torch.zeros(2, device=torch.device("cuda", 0)),
    torch.zeros_like(torch.ones(2), device="cuda"),
    torch.ones(2).new_empty(2, device="cuda"),
    torch.ones(2).to("cuda"),
    torch.ones(2).to(0, non_blocking=True),
    torch.ones(2).to(device="cuda", dtype=torch.bfloat16),
    torch.nn.Linear(2, 2).cuda().weight,
    torch.nn.Linear(2, 2).to("cuda").weight,
):
    assert tensor.device.type == "cpu", tensor

# ``cuda()`` and ``to`` copy no more than they would for a tensor that is there already.
tensor = torch.ones(2)
assert tensor.cuda() is tensor and tensor.to("cuda") is tensor
assert tensor.to(torch.float64).dtype == torch.float64
assert tensor.type() == "torch.cuda.FloatTensor"
assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
assert tensor.type("torch.cuda.DoubleTensor").dtype == torch.float64
tensor.record_stream(torch.cuda.current_stream())
# Memory that only CUDA could pin.
assert torch.empty(2, device="cpu", pin_memory=True).shape == (2,)
assert torch.tensor([3], pin_memory=True).cuda(non_blocking=True).item() == 3
assert tensor.pin_memory() is not tensor and torch.equal(tensor.pin_memory(), tensor)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, 2, device="cuda") * gradient.cuda()


# The redirection also holds within a backward pass.
x = torch.ones(3, requires_grad=True)
Doubled.apply(x).sum().backward()
assert torch.equal(x.grad, torch.full((3,), 2.0))
(gradient,) = torch.autograd.grad(Doubled.apply(x).sum(), x)
assert torch.equal(gradient, torch.full((3,), 2.0))
"""
    )


def test_what_has_no_answer_raises_with_its_name(check: Check) -> None:
    check(
        ENABLE
        + """
import inspect
for name in ("make_graphed_callables", "temperature", "memory_snapshot", "use_mem_pool", "cudart"):
    try:
        getattr(torch.cuda, name)()
    except RuntimeError as error:
        assert str(error).startswith(f"torch.cuda.{name} has no answer on the CPU host"), error
    else:
        raise AssertionError(f"torch.cuda.{name} returned something")
for name in ("CUDAGraph", "MemPool", "ExternalStream", "graph"):
    try:
        getattr(torch.cuda, name)()
    except RuntimeError as error:
        assert f"torch.cuda.{name} has no answer" in str(error), error
    else:
        raise AssertionError(f"torch.cuda.{name} could be made")

# No public function is left that would go to the driver.
from megatron_adam_mini.cpu_host import torch_cuda
for name, value in vars(torch.cuda).items():
    if inspect.isfunction(value) and not name.startswith("_"):
        inner = getattr(value, "__wrapped__", None)
        own = str(value.__module__).startswith(("torch.cuda", "megatron_adam_mini"))
        assert not own or inner is not None or name in torch_cuda._ANSWERS, name
assert torch.cuda.memory.memory_snapshot is torch.cuda.memory_snapshot
assert torch.cuda.random.manual_seed is torch.cuda.manual_seed
try:
    torch.cuda.Stream().cuda_stream
except AttributeError as error:
    assert "cuda_stream" in str(error)
else:
    raise AssertionError("a stream without CUDA gave a handle")
"""
    )


def test_computation_is_bitwise_what_it_is_without(run: Run) -> None:
    training = """
import hashlib
torch.manual_seed(11)
model = torch.nn.Sequential(
    torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 16)
).bfloat16()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
data = torch.randn(8, 16, dtype=torch.bfloat16)
for _ in range(5):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(data), data).backward()
    optimizer.step()
values = torch.cat([p.detach().float().flatten() for p in model.parameters()])
print(hashlib.sha256(values.numpy().tobytes()).hexdigest())
"""
    without = run("import torch\n" + training)
    with_host = run(ENABLE + training)
    assert without.exit_code == 0, without.errors
    assert with_host.exit_code == 0, with_host.errors
    assert without.output == with_host.output
    assert len(without.output.strip()) == 64


def test_megatron_runs_where_it_refused(check: Check) -> None:
    """The changes at import that need one rank; context parallelism is in test_oracle.py."""
    check(
        ENABLE
        + """
import sys
import numpy
from megatron.core.datasets.utils import compile_helpers
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.torch_norm import WrappedTorchNorm

compile_helpers()
config = TransformerConfig(
    num_layers=1, hidden_size=8, num_attention_heads=2, normalization="RMSNorm",
    tensor_model_parallel_size=2, sequence_parallel=True,
)
norm = WrappedTorchNorm(config=config, hidden_size=8)
assert isinstance(norm, torch.nn.RMSNorm) and norm.weight.sequence_parallel
assert config.sequence_parallel
config.sequence_parallel = False
assert not hasattr(WrappedTorchNorm(config=config, hidden_size=8).weight, "sequence_parallel")

convert = token_dispatcher.maybe_move_tensor_to_cpu
assert convert is moe_utils.maybe_move_tensor_to_cpu
assert isinstance(convert(torch.ones(2), as_numpy=True), numpy.ndarray)
assert torch.is_tensor(convert(torch.ones(2))) and convert(None, as_numpy=True) is None
"""
    )


def test_refused_after_megatron_was_imported(run: Run) -> None:
    result = run(
        """
        import sys, types
        sys.modules["megatron.core"] = types.ModuleType("megatron.core")
        from megatron_adam_mini.cpu_host import enable
        enable()
        """
    )
    assert result.exit_code == 1
    assert "must be enabled before megatron.core is imported" in result.errors
    assert "at the top of the program" in result.errors


def test_refused_where_cuda_is_available_unless_forced(run: Run) -> None:
    program = """
        import torch
        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: 4
        from megatron_adam_mini.cpu_host import enable, is_enabled
        enable({})
        assert is_enabled() and torch.cuda.device_count() == 1
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        """
    refused = run(program.format(""))
    assert refused.exit_code == 1
    assert "torch sees 4 here" in refused.errors
    assert "hide the GPUs (CUDA_VISIBLE_DEVICES='')" in refused.errors
    forced = run(program.format("force=True"))
    assert forced.exit_code == 0, forced.errors


def test_importing_the_package_changes_nothing(check: Check) -> None:
    check(
        """
        import sys
        import torch
        available = torch.cuda.is_available
        import megatron_adam_mini.cpu_host
        assert torch.cuda.is_available is available
        assert torch.compile.__module__.startswith("torch")
        assert not any(name.split(".")[0] == "megatron" for name in sys.modules)
        """
    )


def test_flags_are_appended_where_the_user_gave_none() -> None:
    flags = with_cpu_flags(["--num-layers", "2"])
    assert flags[:2] == ["--num-layers", "2"]
    assert flags[2:] == [word for flag in CPU_FLAGS for word in flag]


@pytest.mark.parametrize("given", [["--num-workers", "2"], ["--num-workers=2"]])
def test_flags_of_the_user_stay(given: list[str]) -> None:
    flags = with_cpu_flags([*given, "--no-rope-fusion", "--distributed-backend=gloo"])
    assert flags[: len(given)] == given
    assert sum(flag.startswith("--num-workers") for flag in flags) == 1
    assert flags.count("--no-rope-fusion") == 1
    assert "--distributed-backend" not in flags


@pytest.mark.parametrize(
    "given",
    [
        ["--distributed-backend", "nccl"],
        ["--transformer-impl=transformer_engine"],
        ["--use-persistent-ckpt-worker"],
    ],
)
def test_flags_that_need_cuda_are_refused(given: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{given[0].split('=')[0]} .*does not work on the CPU"):
        with_cpu_flags(given)


def gathered_at_once() -> list[list[float]]:
    """Gather tensors of two dtypes in one coalesced call, as Megatron gathers its buckets."""
    from torch import distributed

    rank = distributed.get_rank()
    inputs = [
        torch.full((4,), rank + 1.0, dtype=torch.bfloat16),
        torch.full((4,), 10.0 * (rank + 1)),
        torch.full((2,), rank + 3.0, dtype=torch.bfloat16),
    ]
    outputs = [tensor.new_zeros(2 * len(tensor)) for tensor in inputs]
    with distributed._coalescing_manager(None, async_ops=True) as pending:
        for into, tensor in zip(outputs, inputs, strict=True):
            distributed.all_gather_into_tensor(into, tensor, async_op=True)
    pending.wait()
    return [tensor.tolist() for tensor in outputs]


def test_weights_of_several_dtypes_are_gathered_at_once() -> None:
    """Gloo alone reads the bits of one dtype as another's."""
    for found in run_ranks(2, gathered_at_once):
        assert found == [[1.0] * 4 + [2.0] * 4, [10.0] * 4 + [20.0] * 4, [3.0] * 2 + [4.0] * 2]
