"""Offline conversion from and to Megatron's Adam of models of other families than GPT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_adam_mini.cli import main
from tests.adam_checkpoints import load_each, read_all, train_and_save
from tests.gather import whole_tensors
from tests.ranks import run_ranks
from tests.test_convert import MEAN_TOLERANCE, STOCK, SUM_TOLERANCE
from tests.test_models import SHOWN, job_of

#: Weights of the first two are stored in parts, of T5 under two names, of DeepSeek in latent form.
CASES = ("Nemotron-H", "Qwen3-Next, dense", "T5", "BERT", "CLIP", "DeepSeek, dense")
#: Of a float32 sum over as many elements as a weight has.
TOTAL_TOLERANCE = 1000 * MEAN_TOLERANCE


@pytest.mark.support(
    {cases: row for cases, row in SHOWN.items() if cases != "Qwen3, dense*"}, "conversion"
)
@pytest.mark.parametrize(
    ("case", "preset"), [(case, "paper") for case in CASES] + [("Nemotron-H", "tensor")]
)
def test_offline_and_on_load_adam_becomes_the_same_and_goes_back(
    case: str, preset: str, tmp_path: Path
) -> None:
    source, ours, back = (tmp_path / name for name in ("adam", "ours", "back"))
    plain = {"bf16": True, "steps": 1, "overlap": False, "bucket_size": None}
    run_ranks(1, train_and_save, job_of(case, "tp1-dp1", optimizer="adam", **plain), str(source))
    command = ["convert", "--to", "adam-mini", "--preset", preset, str(source), str(ours)]
    assert main(command) == 0
    assert main(["verify", str(ours)]) == 0
    job = job_of(case, "tp2-dp2", adam_mini={"preset": preset}, **plain)
    ranks = run_ranks(2, load_each, job, [str(ours), str(source)])
    for key in ("param", "exp_avg", "v"):
        offline, online = (whole_tensors([r[i] for r in ranks], key, job) for i in (0, 1))
        assert offline.keys() == online.keys()
        for name, value in offline.items():
            if key == "v":
                torch.testing.assert_close(value, online[name], rtol=SUM_TOLERANCE, atol=0.0)
            else:
                assert torch.equal(value, online[name]), name
    assert main(["convert", "--to", "adam", str(ours), str(back)]) == 0
    assert main(["verify", str(back)]) == 0
    before, after = read_all(source), read_all(back)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if not key.startswith(f"{STOCK}exp_avg_sq"):
            assert torch.equal(value, after[key]), key
        elif preset == "paper":  # no block spans parts of a weight
            total, kept = (float(t.double().sum()) for t in (value, after[key]))
            assert kept == pytest.approx(total, rel=TOTAL_TOLERANCE)
