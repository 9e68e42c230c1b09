"""``evidence/why.py`` and ``evidence/spectra.py`` at toy size, and what they are made of."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from evidence import quadratic, scaled_mlp, spectra, why

ROOT = Path(__file__).resolve().parents[1]


def test_rotation_keeps_eigenvalues_and_spreads_them():
    values = [1.0, 10.0, 100.0]
    for amount in (0.0, 0.1, 1.0):
        matrix = quadratic.rotated(values, amount, seed=1)
        np.testing.assert_allclose(torch.linalg.eigvalsh(matrix), values)
    assert quadratic.tau(quadratic.rotated(values, 0.0, 1)) == 1.0
    assert quadratic.tau(quadratic.rotated(values, 1.0, 1)) < 0.8
    assert quadratic.tau(torch.ones(4, 4)) == pytest.approx(1 / 4)


def test_both_problems_have_the_same_eigenvalues():
    het, hom = (
        sorted(value for block in blocks for value in block)
        for blocks in (quadratic.HETEROGENEOUS, quadratic.HOMOGENEOUS)
    )
    assert het == hom
    assert quadratic.condition(torch.diag(torch.tensor(het))) == pytest.approx(2000)


def test_r_is_that_of_the_preconditioned_matrix():
    hessian = quadratic.rotated([1.0, 4.0, 50.0], 1.0, seed=2)
    x = torch.randn(3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    preconditioned = torch.diag(1 / (hessian @ x).abs()) @ hessian
    values = torch.linalg.eigvals(preconditioned).real  # not symmetric, but similar to one
    expected = float(values.max() / values.min()) / 50
    assert quadratic.ratio(hessian, seed=5) == pytest.approx(expected)


def test_runs_are_gradient_descent_and_adam_mini_by_the_closed_form():
    hessian, begin = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([2.0, 1.0])
    start = (4.0 + 3.0) / 2
    descent = quadratic.descend([hessian], quadratic.METHODS["gradient descent"], 0.1, 1, [begin])
    assert descent.tolist() == pytest.approx([1.0, (1.8**2 + 3 * 0.7**2) / 2 / start])
    mini = quadratic.descend([hessian], quadratic.METHODS["Adam-mini"], 0.1, 1, [begin])
    root = ((2.0**2 + 3.0**2) / 2) ** 0.5  # of the mean square of the gradient
    x = 2.0 - 0.1 * 2.0 / root, 1.0 - 0.1 * 3.0 / root
    assert mini.tolist() == pytest.approx([1.0, (x[0] ** 2 + 3 * x[1] ** 2) / 2 / start])
    lost = quadratic.descend([hessian], quadratic.METHODS["gradient descent"], 99.0, 9, [begin])
    assert lost[-1] == np.inf


def test_blockwise_descent_solves_each_block_at_its_own_rate():
    hessians = [torch.diag(torch.tensor([v, v])) for v in (1.0, 1000.0)]
    found = quadratic.blockwise([hessians], steps=2, rates=(0.5,))
    assert found.losses.shape == (1, 3)
    assert found.losses[0, 0] == pytest.approx(1.0)
    assert found.last < 1e-10  # 2 / (least + largest) is exact here


def test_degrees_of_the_mlp_are_the_same_function_with_scaled_hessians():
    outputs, largest = [], []
    for degree in (0.0, 0.5):
        torch.manual_seed(0)
        module = scaled_mlp.ScaledMLP(degree)
        outputs.append(module(torch.ones(2, 3, 16, 16)).detach())
        largest.append(scaled_mlp.heterogeneity(degree, steps=3, probes=2).largest)
    torch.testing.assert_close(*outputs)
    np.testing.assert_allclose(np.divide(*largest[::-1]), [0.1, 10.0, 0.1, 10.0], rtol=1e-3)


def skeleton(text: str) -> str:
    """Return the page without what depends on the run."""
    text = re.sub(r"\*\*(Seen|Not seen)\.\*\*", "VERDICT", text)
    return re.sub(r"\d[\d.]*(e[+-]?\d+)?|\blost\b|\d{4}-\d\d-\d\d", "#", text)


def test_the_page_is_what_the_program_makes(tmp_path):
    sizes = why.Sizes(
        seeds=1,
        steps=3,
        rates=(0.01,),
        trials=2,
        mlp={"rates": (0.01,), "steps": 2, "seeds": 1},
    )
    output = tmp_path / "2000-01-01-why.md"
    why.main(["--folder", str(tmp_path), "--output", str(output)], sizes)
    page = (tmp_path / "why.md").read_text(encoding="utf-8")
    assert skeleton(page) == skeleton((ROOT / "docs/why.md").read_text(encoding="utf-8"))
    pictures = re.findall(r"\]\(([\w-]+\.png)\)", page)
    assert len(pictures) == 4
    for name in pictures:
        assert (tmp_path / name).stat().st_size > 0
        assert (ROOT / "docs" / name).stat().st_size < 100_000
    assert "| dense | Adam-mini |" in output.read_text(encoding="utf-8")


def test_spectra_of_networks_are_reported_and_drawn(tmp_path):
    output, picture = tmp_path / "found.md", tmp_path / "found.png"
    sizes = ["--networks", "vgg", "--seeds", "0", "1", "--steps", "1", "--probes", "2"]
    spectra.main([*sizes, "--output", str(output), "--picture", str(picture)])
    text = output.read_text(encoding="utf-8")
    assert "| small VGG | VGG16 0.09 | 8 |" in text
    assert "`18.weight`" in text
    assert picture.stat().st_size > 0
