r"""Pre-train a Llama-style model with ``megatron.training``, as Megatron-LM's own scripts do.

Nothing in it is specific to Adam-mini. The optimizer is selected on the command line:

    torchrun --nproc-per-node 8 -m megatron_adam_mini.launch \
        examples/pretrain_llama.py --optimizer adam_mini ...

Every flag of Megatron works as usual. The data comes from ``--data-path``; for data from
``tokenize_bytes.py``, add ``--tokenizer-type NullTokenizer --vocab-size 257``.
``--state-report FILE`` measures the optimizer's state at the end (see ``state_report.py``).

On GPUs with what ``pip install ".[megatron]"`` brings, without Transformer Engine and Apex, add the
flags for Megatron's own layers:

    --transformer-impl local --no-masked-softmax-fusion --no-persist-layer-norm \
        --no-gradient-accumulation-fusion --no-rope-fusion --no-bias-swiglu-fusion \
        --no-bias-dropout-fusion
"""

import argparse
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import megatron.core.datasets.utils as datasets
import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from state_report import StateReport

Batch = dict[str, torch.Tensor | None]


def get_batch(data_iterator: Iterator[Batch] | None, vp_stage: int | None) -> Batch:
    """Return this rank's part of the next micro-batch: None for each key on a middle stage."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(("tokens", "position_ids", "labels", "loss_mask", "attention_mask"))

    # Only the first rank of a tensor-parallel group reads; the others receive one broadcast per
    # dtype.
    sample = None if data_iterator is None else next(data_iterator)
    batch = tensor_parallel.broadcast_data(
        ["tokens", "position_ids", "labels"], sample, torch.int64
    )
    batch |= tensor_parallel.broadcast_data(["loss_mask"], sample, torch.float32)
    batch["attention_mask"] = None  # causal attention needs none
    if get_args().create_attention_mask_in_dataloader:
        batch |= tensor_parallel.broadcast_data(["attention_mask"], sample, torch.bool)
    if mpu.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(
            {**batch, "cu_seqlens": None},
            is_hybrid_cp=False,
            cp_group=mpu.get_context_parallel_group(),
        )
    return batch


def loss_function(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum of the tokens' losses, the number of tokens, and these for Megatron's log."""
    loss_mask = loss_mask.reshape(-1).float()
    loss = torch.sum(losses.reshape(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(
    data_iterator: Iterator[Batch] | None, model: GPTModel
) -> tuple[torch.Tensor, partial[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]]:
    """Run a micro-batch through this stage; Megatron calls the returned loss on the last stage."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"]
    )
    return output, partial(loss_function, batch["loss_mask"])


def provide_datasets(
    num_samples: list[int], vp_stage: int | None = None
) -> tuple[GPTDataset | None, GPTDataset | None, GPTDataset | None]:
    """Build the training, validation and test sets with the given numbers of samples."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
    )

    def is_built_on_this_rank() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(
            vp_stage
        )

    dataset_type = MockGPTDataset if args.mock_data else GPTDataset
    training, validation, test = BlendedMegatronDatasetBuilder(
        dataset_type, num_samples, is_built_on_this_rank, config
    ).build()
    return training, validation, test


provide_datasets.is_distributed = (
    True  # Megatron then calls it on every rank, not only on the first of each TP group
)


def add_example_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this script's one flag to Megatron's own."""
    parser.add_argument_group("example").add_argument(
        "--state-report",
        metavar="FILE",
        help="after training, write the optimizer's measured state to FILE as JSON",
    )
    return parser


def keep_built_index_builder() -> None:
    """Let Megatron not build the index builder of its datasets where it is built already.

    Rank 0 runs ``make`` for it at start-up, and exits if that fails: a wheel has no Makefile.
    """
    makefile = Path(datasets.__file__).with_name("Makefile")
    if not makefile.exists() and find_spec("megatron.core.datasets.helpers_cpp"):
        datasets.compile_helpers = lambda: None


def main() -> None:
    """Parse Megatron's flags and train."""
    keep_built_index_builder()
    args = parse_and_validate_args(extra_args_provider=add_example_arguments)
    report = StateReport() if args.state_report else None
    pretrain(
        # The layers are Transformer Engine's, or Megatron's own with --transformer-impl local.
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        provide_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    if report is not None:
        report.write(args.state_report)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
