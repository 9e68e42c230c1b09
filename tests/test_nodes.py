"""A run over two "nodes": two agents of torchrun with one rendezvous, on one machine.

The batch script for Slurm and ``examples/train.sh`` say what is started. Agents and rendezvous are
torchrun's, behind its own command line; only the ranks are forked from an agent that has imported
all that they need, where torchrun would start a Python for each.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.ranks import Program, run_ranks, start_program
from tests.test_recipes import EXAMPLES, Launch, launch, sbatch
from tests.test_resume import tokenize

TIMEOUT_S = 240.0
RECIPE = """
NODES=2
TP=2 PP=1 CP=1
MODEL=(
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --swiglu
    --position-embedding-type rope --max-position-embeddings 32 --normalization RMSNorm
    --disable-bias-linear --untie-embeddings-and-output-weights --padded-vocab-size 258
)
LAYOUT=(--tensor-model-parallel-size "$TP")
TRAINING=(
    --seq-length 32 --tokenizer-type NullTokenizer --vocab-size 257 --seed 3 --split 90,10,0
    --train-iters 4 --micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --min-lr 1e-3
    --eval-iters 1 --log-interval 1
)
"""


def agent(words: list[str]) -> None:
    """Be torchrun on one node."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC_", "MASTER_"))]:
        del os.environ[name]  # what start_program tells its ranks
    args = get_args_parser().parse_args(words)
    assert (args.module, args.training_script) == (True, "megatron_adam_mini.launch")
    config, _, _ = config_from_args(args)
    config.start_method = "fork"
    elastic_launch(config, rank)(args.training_script_args)


def rank(arguments: list[str]) -> None:
    """Train as one of the ranks that an agent starts."""
    from megatron_adam_mini import launch as launcher

    launcher.main(["--cpu-host", *arguments])
    from megatron.core import parallel_state

    names = "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS", "_DATA_PARALLEL_GLOBAL_RANKS"
    tensor, data = (getattr(parallel_state, name) for name in names)  # groups are gone by now
    print(f"rank {os.environ['RANK']}: node {os.environ['GROUP_RANK']}, TP {tensor}, DP {data}")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run reads: a recipe, a dataset, and a folder that stands for Megatron-LM."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "tiny.sh").write_text(RECIPE)
    run_ranks(1, tokenize, str(folder / "text"))
    (folder / "pretrain_gpt.py").symlink_to(EXAMPLES / "pretrain_llama.py")
    return {
        "RECIPE": str(folder / "tiny.sh"),
        "MEGATRON_LM": str(folder),
        "DATA_PATH": str(folder / "text"),
        "TOKENIZER_MODEL": "none",
    }


@pytest.fixture
def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    return str(number)


def run(folder: Path, started: list[Launch]) -> tuple[list[str], list[str]]:
    """Run the agents of all nodes; return the losses, and where each rank was."""
    with ExitStack() as stack:
        agents: list[Program] = []
        for node, words in enumerate(started):
            assert words.result.returncode == 0, words.result.stderr
            log = folder / f"node{node}.log"
            one = start_program(1, agent, words.torchrun, log=log, folder=folder)
            agents.append(stack.enter_context(one))
        for one in agents:
            assert one.wait(TIMEOUT_S) == 0, one.output()[-4000:]
        text = "\n".join(one.output() for one in agents)
    losses = re.findall(r"iteration +(\d+)/.*?lm loss: (\S+)", text)
    places = re.findall(r"rank \d: node \d, TP \[[\d, ]+\], DP \[[\d, ]+\]", text)
    return sorted(f"{iteration}: {loss}" for iteration, loss in losses), sorted(places)


def test_two_nodes_train_as_one(inputs: dict[str, str], port: str, tmp_path: Path) -> None:
    environment = {**inputs, "GPUS_PER_NODE": "2", "MASTER_PORT": port}
    environment |= {"CHECKPOINTS": str(tmp_path / "checkpoints"), "HOSTS": "127.0.0.1 other"}
    recipe = environment.pop("RECIPE")
    nodes = [sbatch(tmp_path, recipe, node=node, **environment) for node in (0, 1)]
    losses, places = run(tmp_path, nodes)
    assert places == [
        "rank 0: node 0, TP [0, 1], DP [0, 2]",
        "rank 1: node 0, TP [0, 1], DP [1, 3]",
        "rank 2: node 1, TP [2, 3], DP [0, 2]",
        "rank 3: node 1, TP [2, 3], DP [1, 3]",
    ]

    environment |= {"GPUS_PER_NODE": "4", "NUM_NODES": "1", "CHECKPOINTS": str(tmp_path / "one")}
    alone = launch(tmp_path, str(EXAMPLES / "train.sh"), recipe, **environment)
    same, _ = run(tmp_path, [alone])
    assert [line.split(":")[0] for line in losses] == ["1", "2", "3", "4"]
    assert losses == same
