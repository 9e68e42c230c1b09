"""The recipes for clusters: dry runs, as far as they go without GPUs.

``examples/train.sh`` runs with a torchrun and a planner that write down what they are given; then
the flags go through Megatron's own parser and validation, and through the planner itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from megatron_adam_mini import cli
from megatron_adam_mini.estimate.models import Model
from megatron_adam_mini.estimate.parallel import Parallel
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
RECIPES = sorted(path.stem for path in (EXAMPLES / "recipes").glob("*.sh"))
INPUTS = {"MEGATRON_LM": "/lm", "TOKENIZER_MODEL": "/t.model", "DATA_PATH": "/data/text"}
TIMEOUT_S = 60


@dataclass
class Launch:
    """What a script has started.

    Attributes:
        result: of the script itself.
        plan: arguments of ``megatron-adam-mini``.
        torchrun: those of ``torchrun``; empty: not started.
        environment: of ``torchrun``.
    """

    result: subprocess.CompletedProcess[str]
    plan: list[str]
    torchrun: list[str]
    environment: dict[str, str]

    @property
    def script(self) -> list[str]:
        """The arguments of the training script."""
        return self.torchrun[self.torchrun.index("/lm/pretrain_gpt.py") + 1 :]

    @property
    def world_size(self) -> int:
        return int(self.option("--nnodes")) * int(self.option("--nproc-per-node"))

    def option(self, name: str) -> str:
        return self.torchrun[self.torchrun.index(name) + 1]


def write_program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def launch(folder: Path, *command: str, **environment: str) -> Launch:
    """Run a script with programs on its PATH that write down their arguments."""
    write_program(folder, "megatron-adam-mini", f"printf '%s\\n' \"$@\" >{folder}/plan")
    write_program(folder, "torchrun", f"printf '%s\\n' \"$@\" >{folder}/words; env >{folder}/env")
    result = subprocess.run(
        ["bash", *command],
        env={"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )

    def lines(name: str) -> list[str]:
        path = folder / name
        return path.read_text().splitlines() if path.exists() else []

    found = dict(line.split("=", 1) for line in lines("env") if "=" in line)
    return Launch(result, lines("plan"), lines("words"), found)


def train(folder: Path, recipe: str, *flags: str, **environment: str) -> Launch:
    script = str(EXAMPLES / "train.sh")
    started = launch(folder, script, recipe, *flags, **{**INPUTS, **environment})
    assert started.result.returncode == 0, started.result.stderr
    assert started.torchrun
    return started


def arguments_of(flags: list[str], world_size: int) -> dict[str, Any]:
    """Let Megatron parse and validate flags, as a rank of the job. (A rank has it imported.)"""
    os.environ.update(WORLD_SIZE=str(world_size), RANK="0")
    from megatron.training import arguments

    import megatron_adam_mini

    megatron_adam_mini.register()
    sys.argv = ["pretrain_gpt.py", *flags]
    args = arguments.parse_args()
    arguments.validate_args(args)
    kinds = (bool, int, float, str, list, type(None))
    return {name: value for name, value in vars(args).items() if isinstance(value, kinds)}


def layouts_differ(report: dict[str, Any], args: dict[str, Any]) -> list[str]:
    """Return what the planner was told otherwise than Megatron."""
    differ = []
    for kind, found in ((Model, report["model"]), (Parallel, report["layout"])):
        for field in fields(kind):
            ours, theirs = found[field.name], args.get(field.name)
            if field.name == "moe_layer_freq":
                theirs = {1: "1"}.get(theirs, theirs) if isinstance(theirs, int) else ours
            elif field.name == "num_query_groups" and ours is None:
                continue  # the config has the number of heads, the argument its own default
            elif field.name == "expert_tensor_parallel_size":
                ours = ours or report["layout"]["tensor_model_parallel_size"]
            elif field.name == "moe_ffn_hidden_size" and ours is None:
                continue
            elif field.name == "kv_channels":
                ours = ours or theirs
            if ours != theirs:
                differ.append(f"{field.name}: planned {ours!r}, Megatron has {theirs!r}")
    return differ


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_valid_and_planned_as_it_runs(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = train(tmp_path, recipe, "--exit-interval", "7")
    assert started.environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    (args,) = run_ranks(1, arguments_of, started.script, started.world_size)
    assert args["optimizer"] == "adam_mini"
    assert args["use_distributed_optimizer"]
    assert args["overlap_param_gather"]
    assert args["sequence_parallel"] == (args["tensor_model_parallel_size"] > 1)
    assert (args["adam_beta1"], args["adam_beta2"], args["adam_eps"]) == (0.9, 0.95, 1e-8)
    assert (args["weight_decay"], args["clip_grad"]) == (0.1, 1.0)
    assert args["exit_interval"] == 7
    assert args["global_batch_size"] % (args["micro_batch_size"] * args["data_parallel_size"]) == 0

    assert cli.main([*started.plan, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ranks"] == started.world_size == args["world_size"]
    assert layouts_differ(report, args) == []


def test_a_plan_that_differs_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = train(tmp_path, "mixtral_8x7b")
    (args,) = run_ranks(1, arguments_of, started.script, started.world_size)
    assert cli.main([*started.plan, "--json", "--num-layers", "16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert layouts_differ(report, args) == ["num_layers: planned 16, Megatron has 32"]


@pytest.mark.parametrize(
    ("recipe", "sizes", "message"),
    [
        ("llama2_7b", {"TP": "3"}, "--world-size=32 is not a multiple of"),
        ("llama3_8b", {"TP": "64", "NUM_NODES": "16"}, "--num-attention-heads=32 is not divisible"),
        ("llama3_8b", {"PP": "5", "NUM_NODES": "5"}, "32 layers are not divisible by"),
        ("llama3_8b", {"CP": "3"}, "--world-size=16 is not a multiple of"),
        ("mixtral_8x7b", {"EP": "6", "NUM_NODES": "6"}, "--num-experts=8 is not divisible by"),
        ("mixtral_8x7b", {"NUM_NODES": "3"}, "24 ranks are not divisible by expert-tensor"),
        ("deepseek_v3", {"PP": "8"}, "60 layers are left for the 7 other pipeline stages"),
        (
            "deepseek_v3",
            {"TP": "256", "NUM_NODES": "512"},
            "--num-attention-heads=128 is not divisible by",
        ),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    recipe: str,
    sizes: dict[str, str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = train(tmp_path, recipe, **sizes)
    assert cli.main(started.plan) == 2
    assert message in capsys.readouterr().err


def test_a_layout_that_fits_with_other_sizes(tmp_path: Path, capsys: Any) -> None:
    started = train(tmp_path, "deepseek_v3", PP="8", LAST_LAYERS="5", EP="32", NUM_NODES="64")
    assert cli.main(started.plan) == 0
    assert "512 ranks: TP 2, PP 8" in capsys.readouterr().out


def test_a_refused_plan_starts_nothing(tmp_path: Path) -> None:
    script = str(EXAMPLES / "train.sh")
    (tmp_path / "planner").mkdir()
    planner = f'exec {sys.executable} -m megatron_adam_mini.cli "$@"'
    write_program(tmp_path / "planner", "megatron-adam-mini", planner)
    environment = {"PATH": f"{tmp_path}/planner:{tmp_path}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(ROOT)
    started = launch(tmp_path, script, "llama3_8b", **INPUTS, **environment, TP="3")
    assert started.result.returncode == 2
    assert "--world-size=16 is not a multiple of" in started.result.stderr
    assert "llama3_8b does not fit TP 3 x PP 1 x CP 2 on 2 nodes with 8 GPUs" in (
        started.result.stderr
    )
    assert not started.torchrun


@pytest.mark.parametrize("missing", INPUTS)
def test_missing_input_is_named(missing: str, tmp_path: Path) -> None:
    given = {name: value for name, value in INPUTS.items() if name != missing}
    started = launch(tmp_path, str(EXAMPLES / "train.sh"), "llama2_7b", **given)
    assert started.result.returncode == 1
    assert f"set {missing} to" in started.result.stderr
    assert not started.torchrun


def test_plan_needs_no_input(tmp_path: Path) -> None:
    started = launch(tmp_path, str(EXAMPLES / "train.sh"), "--plan", "llama2_7b")
    assert started.result.returncode == 0, started.result.stderr
    assert started.plan[0] == "memory"
    assert not started.torchrun


@pytest.mark.parametrize("name", ["", "llama_9"])
def test_recipe_that_is_not_there(name: str, tmp_path: Path) -> None:
    started = launch(tmp_path, str(EXAMPLES / "train.sh"), *([name] if name else []), **INPUTS)
    assert started.result.returncode == 2
    assert f"no recipe '{name}'" in started.result.stderr
    assert " ".join(RECIPES) in started.result.stderr


# Slurm.


def sbatch(folder: Path, *arguments: str, node: int, **environment: str) -> Launch:
    """Run the batch script as Slurm would on its first node, and one node's task of its srun.

    ``HOSTS`` names the nodes.
    """
    names = environment.pop("HOSTS", "gpu3 gpu4").replace(" ", "\n")
    write_program(folder, "scontrol", f'[[ $* == "show hostnames gpu[3-4]" ]] && echo "{names}"')
    write_program(
        folder,
        "srun",
        f"printf '%s\\n' \"$@\" >{folder}/srun\n"
        "while [[ $1 == --* ]]; do [[ $1 == --container* ]] && shift; shift; done\n"
        f'SLURM_NODEID={node} exec "$@"',
    )
    slurm = {"SLURM_JOB_NODELIST": "gpu[3-4]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "1234567"}
    slurm["SLURM_SUBMIT_DIR"] = str(ROOT)
    script = str(EXAMPLES / "slurm" / "train.sbatch")
    return launch(folder, script, *arguments, **{**INPUTS, **slurm, **environment})


def test_batch_script_starts_an_agent_on_each_node(tmp_path: Path) -> None:
    for node in (0, 1):
        started = sbatch(tmp_path, "llama3_8b", "--exit-interval", "7", node=node)
        assert started.result.returncode == 0, started.result.stderr
        assert started.option("--node-rank") == str(node)
        assert started.option("--nnodes") == "2"
        assert (started.option("--master-addr"), started.option("--master-port")) == (
            "gpu3",
            "24567",
        )
        assert started.script[-2:] == ["--exit-interval", "7"]
    assert "container" not in (tmp_path / "srun").read_text()


def test_batch_script_with_a_container(tmp_path: Path) -> None:
    started = sbatch(tmp_path, "llama3_8b", node=1, IMAGE="/images/mini.sqsh", MOUNTS="/data:/data")
    assert started.result.returncode == 0, started.result.stderr
    words = (tmp_path / "srun").read_text().splitlines()
    assert words[words.index("--container-image") + 1] == "/images/mini.sqsh"
    assert words[words.index("--container-mounts") + 1] == f"{ROOT}:{ROOT},/data:/data"
    assert started.option("--node-rank") == "1"


def test_batch_script_outside_of_a_checkout(tmp_path: Path) -> None:
    started = sbatch(tmp_path, "llama3_8b", node=0, SLURM_SUBMIT_DIR="/nowhere")
    assert started.result.returncode == 2
    assert "/nowhere is no checkout" in started.result.stderr


def test_batch_script_asks_for_as_many_gpus_as_it_starts_ranks(tmp_path: Path) -> None:
    text = (EXAMPLES / "slurm" / "train.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    started = sbatch(tmp_path, "llama3_8b", node=0)
    assert started.option("--nproc-per-node") == options["gpus-per-node"]
    assert started.option("--nnodes") == options["nodes"]
    assert options["ntasks-per-node"] == "1"
