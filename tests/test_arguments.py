"""Flags through Megatron's own parser and validation, registration, refusals, and the launcher."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megatron_adam_mini
from megatron_adam_mini import AdamMiniConfig
from megatron_adam_mini.config import BACKENDS
from megatron_adam_mini.mcore import preflight, preflight_model
from megatron_adam_mini.mcore.arguments import add_arguments
from tests.ranks import run_ranks

ROOT = Path(megatron_adam_mini.__file__).parents[1]

MODEL = [
    *("--num-layers", "2", "--hidden-size", "16", "--num-attention-heads", "4"),
    *("--seq-length", "16", "--max-position-embeddings", "16", "--micro-batch-size", "1"),
    *("--global-batch-size", "2", "--lr", "1e-3", "--train-iters", "10"),
]

FLAGS = (
    "--adam-mini-preset",
    "--adam-mini-value-as-block",
    "--adam-mini-full-v",
    "--adam-mini-rules",
    "--adam-mini-backend",
    "--adam-mini-manifest",
    "--adam-mini-convert-partition",
    "--adam-mini-no-file-check",
    "--adam-mini-param-remainders",
    "--adam-mini-stochastic-rounding",
    "--adam-mini-lean",
    "--adam-mini-single-phase",
    "--adam-mini-checkpoint-format",
    "--adam-mini-log-heterogeneity",
)


# Bodies that run in a rank, where Megatron is imported.


def parse(arguments: Sequence[str], model: Sequence[str] = MODEL) -> argparse.Namespace:
    """Parse and validate a command line as a Megatron training script does."""
    from megatron.training import arguments as megatron_arguments

    from megatron_adam_mini.cpu_host import with_cpu_flags

    megatron_adam_mini.register()
    sys.argv = ["pretrain_gpt.py", *with_cpu_flags([*model, *arguments])]
    args = megatron_arguments.parse_args()
    megatron_arguments.validate_args(args)
    return args


def error_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str] | None:
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    from megatron.training import training

    args = parse(arguments)
    config, _ = training.get_megatron_optimizer_config(args)
    return {
        "optimizer": args.optimizer,
        "use_distributed_optimizer": args.use_distributed_optimizer,
        "layer_wise": getattr(args, "use_layer_wise_distributed_optimizer", False),
        "config_optimizer": config.optimizer,
        "config_distributed": config.use_distributed_optimizer,
        "config_layer_wise": config.use_layer_wise_distributed_optimizer,
        "adam_mini": getattr(config, "adam_mini", None),
    }


def parse_errors(lines: Sequence[Sequence[str]]) -> list[tuple[str, str] | None]:
    return [error_of(parse, line) for line in lines]


ADAM_MINI = ("--optimizer", "adam_mini", "--use-distributed-optimizer")


def only(results: list[Any]) -> Any:
    (result,) = results
    return result


# Flags.


@pytest.mark.parametrize("sharded", [True, False])
def test_optimizer_keeps_its_name_and_the_distributed_optimizer(sharded):
    found = only(run_ranks(1, parsed, ADAM_MINI if sharded else ADAM_MINI[:2]))
    assert found == {
        "optimizer": "adam_mini",
        "use_distributed_optimizer": sharded,
        "layer_wise": False,
        "config_optimizer": "adam_mini",
        "config_distributed": sharded,
        "config_layer_wise": False,
        "adam_mini": AdamMiniConfig(),
    }


def test_flags_reach_the_config(tmp_path):
    rules = tmp_path / "rules.json"
    rules.write_text('{"*.linear_fc1.weight": "tensor", "*": "row"}')
    flags = [
        *("--adam-mini-preset", "first", "--adam-mini-value-as-block"),
        *("--adam-mini-full-v", "*.bias", "embedding.*"),
        *("--adam-mini-rules", str(rules), "--adam-mini-backend", "reference"),
        *("--adam-mini-manifest", "manifest.json", "--adam-mini-convert-partition"),
        *("--adam-mini-no-file-check", "--adam-mini-param-remainders"),
        *("--adam-mini-stochastic-rounding", "--exp-avg-dtype", "bf16", "--bf16"),
        *("--adam-mini-lean", "--adam-mini-single-phase", "--clip-grad", "0"),
        *("--adam-mini-checkpoint-format", "buckets"),
        *("--adam-mini-log-heterogeneity", "50"),
    ]
    own = [flag for flag in flags if flag.startswith("--adam-mini")]
    assert sorted(own) == sorted(FLAGS)
    assert only(run_ranks(1, parsed, [*ADAM_MINI, *flags]))["adam_mini"] == AdamMiniConfig(
        preset="first",
        value_as_block=True,
        full_v=("*.bias", "embedding.*"),
        rules=(("*.linear_fc1.weight", "tensor"), ("*", "row")),
        backend="reference",
        manifest="manifest.json",
        convert_partition=True,
        check_files=False,
        exp_avg_dtype="bf16",
        stochastic_rounding=True,
        param_remainders=True,
        lean=True,
        single_phase=True,
        checkpoint_format="buckets",
        log_heterogeneity=50,
    )


def test_other_optimizers_are_left_alone():
    found = only(run_ranks(1, parsed, ["--optimizer", "adam", "--use-distributed-optimizer"]))
    assert found["optimizer"] == found["config_optimizer"] == "adam"
    assert found["use_distributed_optimizer"]
    assert found["adam_mini"] is None


def help_text() -> str:
    """Return what SCRIPT --help prints."""
    import contextlib
    import io

    from megatron.training import arguments as megatron_arguments

    megatron_adam_mini.register()
    sys.argv = ["pretrain_gpt.py", "--help"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as caught:
        megatron_arguments.parse_args()
    assert caught.value.code == 0
    return output.getvalue()


def test_help_shows_the_flags():
    # The help of the tested Megatron-Core has a bare '%' of its own, which must not end --help.
    text = only(run_ranks(1, help_text))
    for flag in FLAGS:
        assert flag in text
    group = text[text.index("Adam-mini:") :]
    assert "{paper,row,row-column,slim,first,tensor}" in group
    assert f"{{{','.join(BACKENDS)}}}" in group
    assert "arXiv:2406.16793" in group
    choices = text[text.index("--optimizer {") :].split("}")[0]
    assert choices.endswith(",adam_mini")
    assert "adam," in choices


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--adam-mini-preset", "first"], "--adam-mini-preset"),
        (["--adam-mini-value-as-block"], "--adam-mini-value-as-block"),
        (
            ["--adam-mini-full-v", "x", "--adam-mini-manifest", "y"],
            "--adam-mini-full-v, --adam-mini-manifest",
        ),
        (["--adam-mini-rules", "x"], "--adam-mini-rules"),
        (["--adam-mini-backend", "reference"], "--adam-mini-backend"),
        (["--adam-mini-no-file-check"], "--adam-mini-no-file-check"),
        (["--adam-mini-log-heterogeneity", "5"], "--adam-mini-log-heterogeneity"),
    ],
)
def test_stray_flags_are_refused(flags, named):
    found = run_ranks(1, parse_errors, [["--optimizer", "adam", *flags]])
    text = f"{named} need --optimizer adam_mini, but --optimizer is 'adam'."
    assert only(only(found)) == ("ValueError", text)


def test_bad_values_are_refused_before_megatron_validates(tmp_path):
    missing = str(tmp_path / "missing.json")
    lines = {
        ("--lr", "-1"): ("ValueError", "lr=-1.0 is not allowed"),
        ("--adam-beta1", "1"): ("ValueError", "beta1=1.0 is not allowed"),
        ("--adam-beta2", "-0.5"): ("ValueError", "beta2=-0.5 is not allowed"),
        ("--adam-eps", "0"): ("ValueError", "eps=0.0 is not allowed"),
        ("--weight-decay", "-1"): ("ValueError", "weight_decay=-1.0 is not allowed"),
        ("--adam-mini-log-heterogeneity", "-1"): ("ValueError", "log_heterogeneity=-1 is not"),
        ("--adam-mini-stochastic-rounding",): ("ValueError", "give exp_avg_dtype='bf16'"),
        ("--adam-mini-single-phase",): ("ValueError", "but --clip-grad 1.0 needs it first"),
        ("--adam-mini-single-phase", "--clip-grad", "0", "--fp16"): (
            "ValueError",
            "a loss scale (--fp16 or --loss-scale) needs it first",
        ),
        ("--adam-mini-checkpoint-format", "buckets", "--dist-ckpt-optim-fully-reshardable"): (
            "ValueError",
            "contradict each other",
        ),
        ("--exp-avg-dtype", "fp16"): ("ValueError", "exp_avg_dtype='fp16' is not known; allowed"),
        ("--exp-avg-sq-dtype", "bf16"): ("NotImplementedError", "without --use-precision-aware"),
        ("--main-params-dtype", "fp16"): (
            "NotImplementedError",
            "--main-params-dtype fp16 without --use-precision-aware-optimizer: allowed is fp32",
        ),
        ("--main-grads-dtype", "bf16"): ("NotImplementedError", "Remedy: --grad-reduce-in-bf16"),
        ("--use-precision-aware-optimizer", "--main-params-dtype", "fp16"): (
            "NotImplementedError",
            "--main-params-dtype fp16: allowed is fp32",
        ),
        ("--fp8-param-gather", "--qk-clip"): (
            "NotImplementedError",
            "with --qk-clip: it scales rows of weights, layer by layer. Remedy: drop one of",
        ),
        ("--fp8-param-gather", "--adam-mini-param-remainders", "--bf16"): (
            "NotImplementedError",
            "they complete bfloat16 weights. Remedy: drop one of the two; --exp-avg-dtype bf16",
        ),
        ("--adam-mini-param-remainders", "--fp16"): ("ValueError", "needs --bf16"),
        ("--adam-mini-lean", "--fp16"): (
            "ValueError",
            "--adam-mini-lean needs --bf16: 16 bits complete a bfloat16 weight to its float32 main "
            "parameter, and no other type. Train in bfloat16, or drop it; --exp-avg-dtype bf16 "
            "--adam-mini-stochastic-rounding saves memory with any weights.",
        ),
        ("--adam-mini-lean",): ("ValueError", "--adam-mini-lean needs --bf16"),
        ("--adam-mini-lean", "--fp8-param-gather", "--bf16"): (
            "NotImplementedError",
            "with 16-bit remainders (--adam-mini-param-remainders, --adam-mini-lean):",
        ),
        ("--adam-mini-rules", missing): ("ValueError", f"{missing!r} cannot be read"),
        ("--save", "x", "--ckpt-format", "fsdp_dtensor"): (
            "NotImplementedError",
            "does not support --ckpt-format fsdp_dtensor",
        ),
        ("--load", "x", "--ckpt-format", "torch_dcp"): (
            "NotImplementedError",
            "Remedy: --ckpt-format torch_dist, or --no-save-optim and --no-load-optim.",
        ),
        (
            *("--save", "x", "--ckpt-format", "torch", "--num-experts", "2"),
            *("--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"),
        ): (
            "NotImplementedError",
            "Remedy: --ckpt-format torch_dist, or --expert-tensor-parallel-size 2.",
        ),
        ("--save", "x", "--non-persistent-ckpt-type", "global"): (
            "NotImplementedError",
            "does not support --non-persistent-ckpt-type yet. Remedy: drop the flag.",
        ),
    }
    found = only(run_ranks(1, parse_errors, [[*ADAM_MINI, *line] for line in lines]))
    for (kind, text), error in zip(lines.values(), found, strict=True):
        assert error[0] == kind
        assert text in error[1]


def buckets_without_buckets() -> list[tuple[str, str] | None]:
    """Ask for them on the command line, and in a config."""
    from tests.megatron_job import Job, Trainer

    flags = [*ADAM_MINI[:2], "--adam-mini-checkpoint-format", "buckets"]
    job = Job(layers=1, distributed_optimizer=False, adam_mini={"checkpoint_format": "buckets"})
    return [error_of(parse, flags), error_of(Trainer, job)]


def test_buckets_need_the_distributed_optimizer():
    for error in only(run_ranks(1, buckets_without_buckets)):
        assert error is not None
        assert error[0] == "ValueError"
        assert "buckets needs --use-distributed-optimizer" in error[1]


def optimizer_after_failure() -> tuple[tuple[str, str] | None, str]:
    """Let Megatron's own validation fail: the name must come back."""
    from megatron.training import arguments as megatron_arguments

    megatron_adam_mini.register()
    sys.argv = ["pretrain_gpt.py", *MODEL, *ADAM_MINI, "--tensor-model-parallel-size", "7"]
    args = megatron_arguments.parse_args()
    return error_of(megatron_arguments.validate_args, args), args.optimizer


def test_name_comes_back_when_megatron_refuses():
    error, optimizer = only(run_ranks(1, optimizer_after_failure))
    assert error[0] == "AssertionError"
    assert optimizer == "adam_mini"


def test_parser_without_optimizer_choices_is_refused():
    parser = argparse.ArgumentParser()
    with pytest.raises(RuntimeError, match=r"no --optimizer with choices; this Megatron-Core"):
        add_arguments(parser)
    parser.add_argument("--optimizer")
    with pytest.raises(RuntimeError, match=r"no --optimizer with choices"):
        add_arguments(parser)


# Combinations that are not supported.

#: What each flag needs on a command line, where it has a flag in the tested Megatron-Core.
COMMAND_LINES = {
    "use_megatron_fsdp": ["--use-megatron-fsdp"],
    "use_torch_fsdp2": ["--use-torch-fsdp2"],
    "use_torch_optimizer_for_cpu_offload": ["--use-torch-optimizer-for-cpu-offload"],
    "optimizer_cuda_graph": ["--optimizer-cuda-graph"],
    "fp4_param_gather": ["--fp4-param-gather"],
    "reuse_grad_buf_for_mxfp8_param_ag": ["--reuse-grad-buf-for-mxfp8-param-ag"],
    "param_name_patterns_for_fp32_local_accumulation": [
        "--ddp-param-name-patterns-for-fp32-local-accumulation",
        "*.weight",
    ],
    "dump_param_to_param_group_map": ["--dump-param-to-param-group-map", "map.json"],
    "mtp_detach_heads": ["--mtp-num-layers", "1", "--mtp-detach-heads"],
}

#: Entries that a user can reach through Megatron's configs only.
CONFIG_ONLY = {"use_layer_wise_distributed_optimizer"}


def refusal(attribute: str) -> tuple[str, str]:
    flag, reason, remedy = preflight._REFUSED[attribute]
    return (
        "NotImplementedError",
        f"--optimizer adam_mini does not support {flag}: {reason}. Remedy: {remedy}.",
    )


def test_every_refusal_is_tested():
    assert set(preflight._REFUSED) == set(COMMAND_LINES) | CONFIG_ONLY
    for attribute, line in COMMAND_LINES.items():
        assert preflight._REFUSED[attribute][0] in line
    assert all(reason and remedy for _, reason, remedy in preflight._REFUSED.values())


def test_refused_by_argument():
    lines = [[*ADAM_MINI, *line] for line in COMMAND_LINES.values()]
    found = only(run_ranks(1, parse_errors, lines))
    assert dict(zip(COMMAND_LINES, found, strict=True)) == {a: refusal(a) for a in COMMAND_LINES}


def test_the_same_flags_pass_with_adam_where_megatron_lets_them():
    """Shows that it is Adam-mini that refuses above."""
    lines = [
        [
            "--optimizer",
            "adam",
            "--use-distributed-optimizer",
            "--dump-param-to-param-group-map",
            "map.json",
        ]
    ]
    error = only(only(run_ranks(1, parse_errors, lines)))
    assert error is None or "adam_mini" not in error[1]


def config_errors(attributes: Sequence[str]) -> dict[str, list[tuple[str, tuple[str, str] | None]]]:
    """Set each attribute on Megatron's configs and ask Megatron for an optimizer."""
    from dataclasses import fields, replace

    from megatron.core.optimizer import get_megatron_optimizer

    from tests.megatron_job import Job, Trainer

    trainer = Trainer(Job(layers=1, hidden=16, heads=4, groups=2, ffn=24, vocab=16))
    config, ddp_config = trainer.optimizer.config, trainer.chunks[0].ddp_config
    found: dict[str, list[tuple[str, tuple[str, str] | None]]] = {}
    for attribute in attributes:
        found[attribute] = []
        if attribute in {field.name for field in fields(config)}:
            changed = replace(config)
            setattr(changed, attribute, True)
            error = error_of(get_megatron_optimizer, changed, trainer.chunks)
            found[attribute].append(("OptimizerConfig", error))
        if attribute in {field.name for field in fields(ddp_config)}:
            usual = getattr(ddp_config, attribute)
            setattr(ddp_config, attribute, ["*"] if isinstance(usual, list | tuple) else True)
            error = error_of(get_megatron_optimizer, config, trainer.chunks)
            found[attribute].append(("DistributedDataParallelConfig", error))
            setattr(ddp_config, attribute, usual)
    found["nothing"] = [("", error_of(get_megatron_optimizer, config, trainer.chunks))]
    return found


def test_refused_by_config():
    found = only(run_ranks(1, config_errors, list(preflight._REFUSED)))
    assert found.pop("nothing") == [("", None)]
    for attribute, errors in found.items():
        for where, error in errors:
            assert error == refusal(attribute), where
    # Where a config has no such field, the command line is the only way to ask for it.
    assert {a for a, errors in found.items() if not errors} <= set(COMMAND_LINES)
    assert {a for a, errors in found.items() if errors} >= {
        *CONFIG_ONLY,
        "use_megatron_fsdp",
        "use_torch_optimizer_for_cpu_offload",
        "param_name_patterns_for_fp32_local_accumulation",
    }


def mimo_errors() -> list[tuple[str, str] | None]:
    """Ask for the optimizer of a MIMO model, as the training loop does and directly."""
    from types import SimpleNamespace

    from megatron.core.models.mimo import optimizer
    from megatron.core.models.mimo.model.base import MimoModel
    from megatron.core.optimizer import get_megatron_optimizer

    megatron_adam_mini.register()
    model, config = MimoModel.__new__(MimoModel), SimpleNamespace(optimizer="adam_mini")
    other = SimpleNamespace(optimizer="adam")
    model.mimo_config = SimpleNamespace(module_to_grid_map={})
    return [
        error_of(get_megatron_optimizer, config, [model]),
        error_of(optimizer.get_mimo_optimizer, model, config),
        error_of(optimizer.get_mimo_optimizer, model, other),
    ]


def test_mimo_models_are_refused():
    *refused, other = only(run_ranks(1, mimo_errors))
    for error in refused:
        kind, text = error
        assert kind == "NotImplementedError"
        assert all(part in text for part in preflight_model.MIMO)
    assert other is None


# Registration.


def replaced() -> dict[str, Any]:
    from megatron.core import optimizer
    from megatron.core.models.mimo import optimizer as mimo_optimizer
    from megatron.training import arguments, training

    return {
        "factory": optimizer._get_megatron_emerging_optimizer,
        "mimo": mimo_optimizer.get_mimo_optimizer,
        "add": arguments.add_megatron_arguments,
        "validate": arguments.validate_args,
        "config": training.get_megatron_optimizer_config,
        "log": training.training_log,
    }


def registration_story() -> dict[str, Any]:
    from megatron.training import arguments

    facts: dict[str, Any] = {}
    originals = replaced()
    handle = megatron_adam_mini.register()
    wrapped = replaced()
    facts["all are replaced"] = all(wrapped[k] is not originals[k] for k in originals)
    facts["wrapped once"] = all(wrapped[k].__wrapped__ is originals[k] for k in originals)
    facts["names are kept"] = all(wrapped[k].__name__ == originals[k].__name__ for k in originals)
    facts["same handle"] = megatron_adam_mini.register() is handle
    facts["idempotent"] = replaced() == wrapped
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser())
    facts["flag once"] = sum("--adam-mini-preset" in a.option_strings for a in parser._actions)

    later = arguments.validate_args
    arguments.validate_args = lambda *args, **kwargs: later(*args, **kwargs)
    facts["wrapped later"] = error_of(handle.undo)
    facts["nothing half undone"] = all(
        replaced()[key] is wrapped[key] for key in ("factory", "add", "config")
    )
    arguments.validate_args = later
    handle.undo()
    facts["restored"] = replaced() == originals
    handle.undo()
    facts["undo twice"] = replaced() == originals
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser())
    facts["flags gone"] = not any("--adam-mini-preset" in a.option_strings for a in parser._actions)
    with megatron_adam_mini.register() as again:
        facts["new handle"] = again is not handle
        facts["replaced again"] = replaced() != originals
    facts["restored again"] = replaced() == originals
    return facts


def wrapper_that_a_script_has_imported() -> Any:
    from megatron.core import optimizer

    from megatron_adam_mini.mcore import compat

    name = compat.FACTORY.name
    setattr(optimizer, name, lambda config, model_chunks: f"Megatron's {config.optimizer}")
    with megatron_adam_mini.register():
        imported = getattr(optimizer, name)
    return imported(SimpleNamespace(optimizer="adam_mini"), [])


def test_what_a_script_has_imported_is_megatrons_after_the_end_of_the_registration():
    """Before 0.18 scripts import the function that is wrapped."""
    assert only(run_ranks(1, wrapper_that_a_script_has_imported)) == "Megatron's adam_mini"


def test_registration_is_idempotent_and_reversible():
    facts = only(run_ranks(1, registration_story))
    assert facts.pop("flag once") == 1
    assert facts.pop("wrapped later") == (
        "RuntimeError",
        "megatron.training.arguments.validate_args was replaced after "
        "megatron_adam_mini.register(); undo the later replacement first.",
    )
    assert facts
    assert facts == dict.fromkeys(facts, True)


def keyword_outcomes(given: Sequence[dict[str, Any]]) -> list[tuple[str, str] | None]:
    """Build Adam-mini as a caller does that passes more than the tested release."""
    from types import SimpleNamespace

    from megatron.core import optimizer

    from megatron_adam_mini.mcore import registration

    registration.build_optimizer = lambda *_: None
    megatron_adam_mini.register()
    config = SimpleNamespace(optimizer="adam_mini")
    build = optimizer._get_megatron_emerging_optimizer
    return [error_of(build, config=config, model_chunks=[], **more) for more in given]


def test_keywords_that_would_be_dropped_in_silence_are_refused():
    harmless = [
        {},
        {"config_overrides": {}, "pg_collection": None},
        {"dump_param_to_param_group_map": None, "something_new": None},
        # The default of get_megatron_optimizer.
        {"use_gloo_process_groups": True},
    ]
    refused = [
        {"default_skip_embedding_weight_decay": True},
        {"something_new": 0, "use_gloo_process_groups": False},
    ]
    found = only(run_ranks(1, keyword_outcomes, harmless + refused))
    assert found[: len(harmless)] == [None] * len(harmless)
    text = (
        "--optimizer adam_mini does not support {}, which it was given and does not know. Remedy: "
        "leave it out, or use a release of Megatron-Core that Adam-mini was tested with."
    )
    assert found[len(harmless) :] == [
        ("NotImplementedError", text.format("default_skip_embedding_weight_decay=True")),
        ("NotImplementedError", text.format("something_new=0, use_gloo_process_groups=False")),
    ]


def warnings_at_registration(version: str | None) -> list[str]:
    import logging

    from megatron_adam_mini.mcore import compat

    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(f"{record.levelname} {record.getMessage()}")

    logging.getLogger("megatron_adam_mini").addHandler(Handler())
    if version is not None:
        compat.MCORE_VERSION = version
    megatron_adam_mini.register()
    megatron_adam_mini.register()
    return records


def test_untested_version_of_megatron_core_warns_once_with_both_versions():
    (warning,) = only(run_ranks(1, warnings_at_registration, "0.99.0"))
    assert warning.startswith(
        "WARNING megatron-adam-mini was tested with megatron-core 0.16.1, 0.17.1, 0.18.2, 0.19.2, "
        "0.20.0, but this is 0.99.0."
    )
    assert "tools/releases.sh" in warning
    assert "install megatron-core==0.19.2" in warning


@pytest.mark.parametrize("version", [None, "0.19.2", "0.19.2+c9434831", "0.19.1"])
def test_tested_version_does_not_warn(version):
    """Nor one with the commit of a git folder around it, nor the version of tag core_v0.19.0."""
    assert only(run_ranks(1, warnings_at_registration, version)) == []


# The launcher.


def launch(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_adam_mini.launch", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
    )


def test_launcher_shows_its_version():
    result = launch("--version")
    assert result.returncode == 0
    assert result.stdout.strip() == megatron_adam_mini.__version__


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere.py", "--lr", "1"], "script 'nowhere.py' does not exist; name a Megatron"),
        ([], "the following arguments are required: SCRIPT"),
        (["--cpu", "nowhere.py"], "unrecognized arguments: --cpu"),
    ],
)
def test_launcher_refuses(arguments, text):
    result = launch(*arguments)
    assert result.returncode == 2
    assert text in result.stderr


SCRIPT = """
import sys
import neighbour
import megatron_adam_mini
from megatron.training import arguments

print("RESULT", __name__, neighbour.VALUE, hasattr(arguments.validate_args, "__wrapped__"))
print("MEGATRON", arguments.__file__)
print("ARGV", *sys.argv)
"""


def write_script(folder: Path) -> Path:
    (folder / "neighbour.py").write_text("VALUE = 'found'\n")
    # Of a checkout of Megatron-LM, the wheel of Megatron-Core is installed beside it.
    (installed,) = importlib.util.find_spec("megatron").submodule_search_locations
    (folder / "megatron").symlink_to(installed)
    script = folder / "train.py"
    script.write_text(SCRIPT)
    return script


def test_launcher_runs_a_script_as_main_with_its_arguments_and_its_folder(tmp_path):
    script = write_script(tmp_path)
    given = ["--lr", "1e-3", "--version", "--cpu-host", "a b"]
    result = launch("--cpu-host", str(script), *given)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(" ", 1) for line in result.stdout.splitlines() if " " in line)
    assert lines["RESULT"] == "__main__ found True"
    assert lines["MEGATRON"] == str(tmp_path / "megatron" / "training" / "arguments.py")
    assert lines["ARGV"].startswith(" ".join([str(script), *given]) + " --distributed-backend gloo")


def launched(script: str, arguments: Sequence[str]) -> tuple[list[str], str, bool]:
    """Run the launcher inside a rank, where the CPU host is already there."""
    import contextlib
    import io

    from megatron_adam_mini import launch as launcher

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        launcher.main([script, *arguments])
    return sys.argv, output.getvalue(), sys.path[0] == str(Path(script).parent)


def test_launcher_adds_no_argument_without_cpu_host(tmp_path):
    script = str(write_script(tmp_path))
    argv, output, first = only(run_ranks(1, launched, script, ["--lr", "1", "--help"]))
    assert argv == [script, "--lr", "1", "--help"]
    assert "RESULT __main__ found True" in output
    assert first
