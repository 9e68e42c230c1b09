"""The dtypes that Megatron's parser takes for its precision-aware Adam: all of them, together."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_adam_mini.config import EXP_AVG_DTYPES, AdamMiniConfig
from megatron_adam_mini.mcore.low_precision import dtype_name, report_other_storage, storage_options
from tests.ranks import run_ranks
from tests.training_run import Run, Seen, make_dataset, train

AWARE = "--use-precision-aware-optimizer"
#: Choices of Megatron's parser.
CHOICES = {
    "main_params_dtype": ("fp32", "fp16"),
    "main_grads_dtype": ("fp32", "bf16"),
    "exp_avg_dtype": ("fp32", "fp16", "bf16", "fp8"),
    "exp_avg_sq_dtype": ("fp32", "fp16", "bf16", "fp8"),
}


def options_of(**given: str | bool) -> dict[str, Any]:
    """Return how state is stored in a run with these arguments, beside bfloat16 weights."""
    source = SimpleNamespace(bf16=True, **given)
    return storage_options(source, AdamMiniConfig()).storage_fields()


@pytest.mark.parametrize("values", itertools.product(*CHOICES.values()), ids="-".join)
def test_each_combination_is_accepted_or_refused_with_the_nearest(values: tuple[str, ...]) -> None:
    main, _, m, _ = values
    given = {"use_precision_aware_optimizer": True, **dict(zip(CHOICES, values, strict=True))}
    if main == "fp16":
        with pytest.raises(NotImplementedError, match=r"--main-params-dtype fp16: allowed is fp32"):
            options_of(**given)
    elif m not in EXP_AVG_DTYPES:
        with pytest.raises(ValueError, match=rf"Nearest to {m} \(--exp-avg-dtype\) is bf16"):
            options_of(**given)
    else:
        found = options_of(**given)
        assert (found["exp_avg_dtype"], found["param_remainders"]) == (m, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in CHOICES.items() for value in values[1:]],
)
def test_without_the_flag_only_m_may_have_another_dtype(name: str, value: str) -> None:
    if name != "exp_avg_dtype":
        text = rf"{value} without {AWARE}: allowed is fp32. Remedy: "
        with pytest.raises(NotImplementedError, match=text):
            options_of(**{name: value})
    elif value in EXP_AVG_DTYPES:
        found = options_of(**{name: value})
        assert (found["exp_avg_dtype"], found["param_remainders"]) == (value, False)


def test_dtypes_may_have_torchs_names() -> None:
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "fp8"}
    for name, megatrons in {**names, "float8_e4m3fn": "fp8"}.items():
        dtype = getattr(torch, name)
        assert dtype_name(name) == dtype_name(dtype) == dtype_name(str(dtype)) == megatrons
        assert dtype_name(megatrons) == megatrons


@pytest.mark.parametrize(
    ("saved", "own", "said"),
    [
        ("fp32", "fp8", "m is rounded to fp8 once, now."),
        ("bf16", "fp8", "m is rounded to fp8 once, now."),
        ("fp8", "bf16", "m is that of the checkpoint."),
        ("fp8", "fp32", "m is that of the checkpoint."),
    ],
)
def test_what_another_storage_of_m_loses_is_said(
    saved: str, own: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = [AdamMiniConfig(exp_avg_dtype=dtype) for dtype in (saved, own)]
    report_other_storage(options[0].storage_fields(), options[1])
    (text,) = caplog.messages
    assert text.endswith(said)


@pytest.mark.parametrize("own", [dtype for dtype in EXP_AVG_DTYPES if dtype != "fp32"])
@pytest.mark.parametrize("megatrons", [*EXP_AVG_DTYPES, torch.float32, torch.bfloat16, torch.uint8])
def test_options_and_config_may_not_want_different_m(
    own: str, megatrons: str | torch.dtype
) -> None:
    """As a recipe's dtype beside options that were attached to the config, or ADAM_MINI_FLAGS."""
    source = SimpleNamespace(bf16=True, use_precision_aware_optimizer=True, exp_avg_dtype=megatrons)
    options = AdamMiniConfig(exp_avg_dtype=own)
    if dtype_name(megatrons) in ("fp32", own):
        assert storage_options(source, options).exp_avg_dtype == own
    else:
        with pytest.raises(
            ValueError, match=rf"exp_avg_dtype='{own}', but the config has .* for m"
        ):
            storage_options(source, options)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data") / "text")


LEAN = "--adam-mini-lean"
IN_BF16 = "--grad-reduce-in-bf16 --ddp-reduce-scatter-with-fp32-accumulation"


@pytest.mark.parametrize(
    ("flags", "same"),
    {
        "bf16 gradients": (
            f"{AWARE} --main-grads-dtype bf16 --exp-avg-sq-dtype bf16",
            "--grad-reduce-in-bf16",
        ),
        "bf16 gradients, summed in float32": (f"{LEAN} {IN_BF16}", ""),
    }.values(),
    ids=["bf16 gradients", "bf16 gradients, summed in float32"],
)
def test_gradients_in_bf16_through_the_training_loop(data: str, flags: str, same: str) -> None:
    """Four data-parallel ranks; a run with float32 gradients is another one, but near."""

    def go(flags: str) -> list[Seen]:
        seen: list[Seen] = run_ranks(4, train, Run(f"{data} --global-batch-size 4 {flags}"))
        assert [one.error for one in seen] == [None] * 4
        return seen

    found = go(flags)
    said = [[text for text in one.warnings if "keeps v in float32" in text] for one in found]
    assert [len(texts) for texts in said] == [int("--exp-avg-sq-dtype" in flags), 0, 0, 0]
    weights = found[0].end["weights"]
    for one in found[1:]:
        assert all((one.end["weights"][name] == values).all() for name, values in weights.items())
    full = go(LEAN if LEAN in flags else AWARE)[0]
    largest = max(abs(values).max() for values in weights.values())
    moved = [
        float(abs(values - full.end["weights"][name]).max() / largest)
        for name, values in weights.items()
    ]
    assert 0.0 < max(moved) < 0.05
    if same:
        other = go(f"--adam-mini-param-remainders {same}")[0]
        assert all((other.end["weights"][name] == values).all() for name, values in weights.items())
