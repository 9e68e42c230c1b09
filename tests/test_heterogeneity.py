"""Hessian spectra of blocks against exact eigenvalues, their distance, and the command."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention

from megatron_adam_mini import AdamMiniConfig, cli
from megatron_adam_mini.heterogeneity.distance import (
    Axis,
    average,
    densities,
    distances,
    jensen_shannon,
    log_axis,
)
from megatron_adam_mini.heterogeneity.lanczos import Spectrum, spectrum, tridiagonal
from megatron_adam_mini.heterogeneity.measurement import Options, measure
from megatron_adam_mini.heterogeneity.parts import parts_of
from megatron_adam_mini.heterogeneity.products import BlockHessian
from megatron_adam_mini.standalone.blocks import Heads

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
#: Of float64 sums over at most a hundred elements, relative to the largest eigenvalue.
CLOSE = 1e-10


def symmetric(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return matrix + matrix.T


def estimate(matrix: Tensor, **changes: Any) -> Spectrum:
    options = {"steps": len(matrix), "probes": 1, "dtype": torch.float64, "device": CPU}
    options |= {"generator": torch.Generator().manual_seed(1)} | changes
    return spectrum(lambda vector: matrix @ vector, len(matrix), **options)


class Tiny(nn.Module):
    """Attention and an MLP, one with transposed weights as GPT-2's in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Module()
        self.h.attn = nn.Module()
        self.h.attn.c_attn = nn.Module()
        self.h.attn.c_attn.weight = nn.Parameter(torch.randn(4, 12))
        self.h.attn.c_attn.bias = nn.Parameter(torch.zeros(12))
        self.h.mlp = nn.Module()
        self.h.mlp.c_fc = nn.Module()
        self.h.mlp.c_fc.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        qkv = x @ self.h.attn.c_attn.weight + self.h.attn.c_attn.bias
        query, key, value = qkv.unflatten(-1, (6, 2)).transpose(1, 2).chunk(3, dim=1)
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return torch.tanh(mixed) @ self.h.mlp.c_fc.weight


def tiny() -> tuple[nn.Module, Any, list[Any]]:
    torch.manual_seed(0)
    batches = [(torch.randn(2, 3, 4), torch.randn(2, 3, 3)) for _ in range(2)]
    return Tiny(), lambda module, batch: mse_loss(module(batch[0]), batch[1]), batches


def exact_hessian(module: nn.Module, loss: Any, batches: list[Any], name: str) -> Tensor:
    """Return the Hessian of the mean loss by one parameter, by torch."""
    param = dict(module.named_parameters())[name]

    def of_flat(flat: Tensor) -> Tensor:
        whole = flat.reshape(param.shape)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.stack(
                [
                    loss(lambda x: torch.func.functional_call(module, {name: whole}, (x,)), batch)
                    for batch in batches
                ]
            ).mean()

    return torch.autograd.functional.hessian(of_flat, param.detach().flatten())


# Lanczos.


def test_nodes_of_as_many_steps_as_rows_are_the_eigenvalues():
    matrix = symmetric(40)
    exact = torch.linalg.eigvalsh(matrix).numpy()
    found = estimate(matrix)
    np.testing.assert_allclose(np.sort(found.nodes), exact, atol=CLOSE * abs(exact).max())
    assert found.weights.sum() == pytest.approx(1.0)


def test_few_steps_give_moments_of_the_probe_exactly_and_the_ends_of_the_spectrum():
    matrix = symmetric(40)
    start = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start /= start.norm()
    found = estimate(matrix, steps=6)
    powered = start
    for power in range(1, 12):  # 2 * steps - 1 of them
        powered = matrix @ powered
        assert found.moment(power) == pytest.approx(float(start @ powered), rel=1e-9)
    exact = torch.linalg.eigvalsh(matrix)
    least, largest = estimate(matrix, steps=25).range
    assert least == pytest.approx(float(exact[0]), rel=1e-3)
    assert largest == pytest.approx(float(exact[-1]), rel=1e-3)


def test_many_probes_give_the_moments_of_the_spectrum():
    matrix = symmetric(40)
    exact = torch.linalg.eigvalsh(matrix)
    found = estimate(matrix, steps=10, probes=400)
    for power in (1, 2, 3, 4):
        mean, spread = (exact**power).mean(), (exact**power).std()
        # Of 400 probes of 40 dimensions; a probe's variance is about 2 / 40 of the spectrum's.
        tolerance = 4 * float(spread) * (2 / 40 / 400) ** 0.5
        assert found.moment(power) == pytest.approx(float(mean), abs=tolerance)


def test_equal_eigenvalues_end_the_steps_early():
    matrix = torch.diag(torch.tensor([2.0] * 5 + [7.0] * 5, dtype=torch.float64))
    diagonal, beside = tridiagonal(lambda v: matrix @ v, torch.ones(10, dtype=torch.float64), 10)
    assert (len(diagonal), len(beside)) == (2, 1)
    zero = torch.zeros(10, 10, dtype=torch.float64)
    assert estimate(zero).range == (0.0, 0.0)
    assert sorted(np.round(estimate(matrix).nodes, 9)) == [2.0, 7.0]


def test_vectors_stay_orthogonal_when_eigenvalues_have_converged():
    """Without reorthogonalisation, the large eigenvalue would be found several times."""
    matrix = torch.diag(torch.cat((torch.tensor([1e6]), torch.linspace(0, 1, 199)))).double()
    nodes = estimate(matrix, steps=60).nodes
    assert (nodes > 2).sum() == 1


def test_a_product_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="not finite after 0 Lanczos steps"):
        tridiagonal(lambda v: v * math.nan, torch.ones(3), 2)


# Hessians of blocks.


@pytest.mark.parametrize("preset", ["tensor", "paper", "row"])
def test_products_are_those_of_the_exact_hessian(preset):
    module, loss, batches = tiny()
    module.double()
    batches = [tuple(part.double() for part in batch) for batch in batches]
    parts = parts_of(module, AdamMiniConfig(preset=preset), Heads(2), blocks_per_parameter=99)
    # c_attn: Query, Key, Value; 2 heads of Query and of Key and 4 rows of Value; 12 rows.
    of_qkv = {"tensor": 3, "paper": 8, "row": 12}[preset]
    assert len(parts) == of_qkv + (1 if preset == "tensor" else 3)
    for name in ("h.attn.c_attn.weight", "h.mlp.c_fc.weight"):
        exact = exact_hessian(module, loss, batches, name)
        seen = []
        for part in parts:
            if not part.name.startswith(name):
                continue
            index = torch.arange(part.param.numel()) if part.index is None else part.index
            block = exact[index][:, index]
            product = BlockHessian(part, module, loss, batches)
            columns = torch.stack([product(row) for row in torch.eye(part.numel).double()])
            torch.testing.assert_close(columns, block)
            seen += index.tolist()
        assert sorted(seen) == list(range(len(exact)))


def test_blocks_are_output_neurons_where_weights_are_transposed():
    module, _, _ = tiny()
    parts = parts_of(module, AdamMiniConfig(preset="row"), Heads(2), blocks_per_parameter=99)
    assert parts[1].index is not None
    assert parts[1].index.tolist() == [1, 13, 25, 37]


def test_blocks_of_columns_are_inputs():
    module, _, _ = tiny()
    config = AdamMiniConfig(preset="tensor", rules=(("*c_fc.weight", "column"),))
    parts = parts_of(module, config, Heads(2), patterns=("*c_fc*",), blocks_per_parameter=99)
    assert [part.index.tolist() for part in parts] == [
        [3 * n, 3 * n + 1, 3 * n + 2] for n in range(4)
    ]


@pytest.mark.parametrize(("dtype", "close"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("one_batch", [True, False])
def test_measured_spectra_are_the_exact_eigenvalues(dtype, close, one_batch):
    module, loss, batches = tiny()
    batches = batches[:1] if one_batch else batches
    found = measure(module, loss, batches, Options(steps=99, heads=Heads(2), dtype=dtype))
    fused = [f"h.attn.c_attn.weight[{number}]" for number in range(3)]
    assert found.names == (*fused, "h.mlp.c_fc.weight")
    exact = exact_hessian(
        module.double(),
        loss,
        [tuple(part.double() for part in batch) for batch in batches],
        "h.mlp.c_fc.weight",
    )
    values = torch.linalg.eigvalsh(exact).numpy()
    # Several are equal and found once.
    gaps = np.abs(found.spectra[-1].nodes[:, None] - values[None]).min(1)
    assert gaps.max() < close * values.max()
    # The mean of the eigenvalues, from four probes: no more than an estimate.
    assert found.spectra[-1].moment(1) == pytest.approx(values.mean(), rel=0.5)


def test_the_same_seed_gives_the_same_numbers():
    first, again = (measure(*tiny(), Options(steps=4, heads=Heads(2))) for _ in range(2))
    other = measure(*tiny(), Options(steps=4, heads=Heads(2), seed=1))
    assert first.js0() == again.js0() != other.js0()
    assert 0 < first.noise() < first.js0()


def test_a_parameter_that_the_loss_is_linear_in_has_the_spectrum_of_zero():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    found = measure(module, lambda made, x: made(x).sum(), [torch.ones(1, 3)], Options(steps=2))
    assert [spectrum.range for spectrum in found.spectra] == [(0.0, 0.0)] * 2
    assert found.js0() == pytest.approx(0.0)


# Distances.


def test_divergence_of_equal_and_of_separate_distributions():
    first, second = np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.1, 0.9])
    assert jensen_shannon(first, first) == 0.0
    assert jensen_shannon(first, second) == pytest.approx(math.log(2))
    half = jensen_shannon(np.array([1.0, 0.0]), np.array([0.5, 0.5]))
    assert half == pytest.approx(
        0.5 * math.log(1 / 0.75) + 0.25 * (math.log(0.5 / 0.75) + math.log(0.5 / 0.25))
    )


def of(*values: float) -> Spectrum:
    return Spectrum(np.array(values), np.full(len(values), 1 / len(values)))


def test_smoothed_spectra_are_distributions_whose_distance_is_known():
    first, second = of(0.0), of(1.0)
    found = densities([first, second], Axis(None, 0.01))
    np.testing.assert_allclose(found.masses.sum(1), 1.0)
    assert average(distances([first, second], Axis(None, 0.01))) == pytest.approx(math.log(2))
    assert average(distances([first, second], Axis(None, 100.0))) < 1e-4
    # Two of three pairs are far apart.
    three = average(distances([of(0.0), of(1.0), of(1.0)], Axis(None, 0.01)))
    assert three == pytest.approx(2 / 3 * math.log(2))


def test_the_logarithmic_axis_sees_decades_whatever_the_scale_of_the_loss():
    spectra = [of(1.0, -2.0), of(1e-3, -2e-3)]
    found, scaled = (
        average(distances(made, log_axis(made, floor=1e-6, width=0.5)))
        for made in (spectra, [spectrum.scaled(1e-9) for spectrum in spectra])
    )
    assert found == pytest.approx(scaled)
    assert found > 0.6
    # Below the floor all is zero.
    floored = log_axis(spectra, floor=10.0, width=0.5)
    assert average(distances(spectra, floored)) < 0.01
    np.testing.assert_allclose(
        Axis(1.0, 0.5).places(np.array([1e3, -1e5, 0.0])), [3.0, -5.0, 0.0], atol=1e-6
    )


# What is refused.


def noisy(module: nn.Module, batch: Any) -> Tensor:
    return torch.rand(())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 is not allowed"),
        ({"probes": 3}, "probes=3 is not allowed; it must be an even number"),
        ({"dtype": "float16"}, "dtype='float16' is not known; allowed: float32, float64"),
        ({"floor": 0.0}, "floor=0.0 is not allowed; it must be > 0"),
    ],
)
def test_options_that_are_not_allowed(change, message):
    with pytest.raises(ValueError, match=message):
        Options(**change)


def test_what_cannot_be_measured():
    module, loss, batches = tiny()
    for arguments, message in (
        ((module, loss, []), "There are no batches"),
        ((module, noisy, batches), r"The loss of one batch is .* Remedy: module.eval\(\)"),
        ((module, lambda m, b: m(b[0]), batches), "must be one finite number"),
        ((module, loss, batches, Options(patterns=("gone",))), "0 block is left of 3 trained"),
        (
            (module, loss, batches, Options(config=AdamMiniConfig(rules=(("gone", "row"),)))),
            "rules for 'gone' match no parameter",
        ),
        ((module, loss, batches, Options(config=AdamMiniConfig())), "needs num_heads="),
    ):
        with pytest.raises(ValueError, match=message):
            measure(*arguments)


# The command, as docs/heterogeneity.md shows it.


def document() -> tuple[str, list[str], str]:
    """Return the document's model, its command and its Python."""
    text = (ROOT / "docs/heterogeneity.md").read_text(encoding="utf-8")
    model, api = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    command = re.search(r"^```console\n\$ (.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert command is not None
    return model, shlex.split(command[1].replace("\\\n", "")), api


def test_the_document_s_model_command_and_python(tmp_path, monkeypatch, capsys):
    model, command, api = document()
    (tmp_path / "my_model.py").write_text(model, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert command[:3] == ["megatron-adam-mini", "heterogeneity", "my_model:build"]
    assert cli.main(command[1:]) == 0
    shown = capsys.readouterr().out
    assert "JS^0" in shown
    assert "fc1.weight" in shown
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*command[1:], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert f"JS^0 {report['js0']:.4f} nats" in shown
    made: dict[str, Any] = {}
    exec(api, made)
    assert made["measured"].js0() == pytest.approx(report["js0"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_model", "'my_model' names no model. It must have the form MODULE:FUNCTION"),
        ("no_such_module:build", "There is no module 'no_such_module'"),
        ("tests.test_heterogeneity:gone", "has no 'gone'"),
        ("tests.test_heterogeneity:document", "returned tuple. It must have the form"),
    ],
)
def test_targets_that_are_no_model(target, message, capsys):
    assert cli.main(["heterogeneity", target]) == 2
    assert message in capsys.readouterr().err


def test_what_a_module_lacks_is_not_taken_for_the_module(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_package\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        cli.main(["heterogeneity", "needs_more:build"])


# The networks of evidence.


@pytest.mark.parametrize("name", ["resnet", "vgg", "mixer", "vit", "gpt"])
def test_networks_of_the_evidence_can_be_measured(name):
    from evidence import networks

    module, loss, batches = getattr(networks, name)()
    found = measure(module, loss, batches, Options(steps=1, probes=2))
    assert len(found.names) == {"resnet": 12, "vgg": 8, "mixer": 18, "vit": 27, "gpt": 27}[name]
    with torch.no_grad():
        value = float(loss(module, batches[0]))
    assert value == pytest.approx(
        float(cross_entropy(torch.zeros(1, 256 if name == "gpt" else 10), torch.tensor([0]))),
        rel=0.3,
    )
