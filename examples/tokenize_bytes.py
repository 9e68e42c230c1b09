"""Tokenise the source of the Python standard library, which every machine has, for Megatron.

A token is a byte, and 256 ends a document: use ``--tokenizer-type NullTokenizer --vocab-size 257``.
One file is one document. Documents are sorted by a hash of their names: the order is the same for
the same Python everywhere, and the last documents, which Megatron's ``--split`` uses for
validation, are a random sample.

    python examples/tokenize_bytes.py --output-prefix build/stdlib --max-bytes 4000000
"""

import argparse
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257

_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
"""Folders of third-party packages, or of tests, which some Pythons lack."""


def list_documents(folder: Path) -> list[Path]:
    """Return the source files under ``folder`` in a fixed order unrelated to their content."""
    names = [
        name
        for name in (path.relative_to(folder) for path in folder.rglob("*.py"))
        if _EXCLUDED_FOLDERS.isdisjoint(name.parts)
    ]
    return [
        folder / name
        for name in sorted(
            names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()
        )
    ]


def read_documents(paths: list[Path], max_bytes: int) -> Iterator[numpy.ndarray]:
    """Yield each file's tokens with an end of document, up to ``max_bytes`` bytes in total."""
    remaining = max_bytes
    for path in paths:
        text = path.read_bytes()
        if len(text) > remaining:
            return
        if text:
            remaining -= len(text)
            yield numpy.append(
                numpy.frombuffer(text, dtype=numpy.uint8).astype(numpy.uint16), END_OF_DOCUMENT
            )


def write_dataset(documents: Iterable[numpy.ndarray], output_prefix: Path) -> int:
    """Write ``documents`` to OUTPUT_PREFIX.bin and .idx; return the number of tokens."""
    # Imported here, because it takes seconds: a wrong argument is reported before.
    from megatron.core.datasets.indexed_dataset import (
        DType,
        IndexedDatasetBuilder,
        get_bin_path,
        get_idx_path,
    )

    output_prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix = str(output_prefix)
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=DType.optimal_dtype(VOCAB_SIZE))
    num_tokens = 0
    for tokens in documents:
        builder.add_document(tokens, [tokens.size])
        num_tokens += tokens.size
    builder.finalize(get_idx_path(prefix))
    return num_tokens


def main() -> None:
    """Parse the command line and write the dataset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output-prefix",
        type=Path,
        required=True,
        help="path of the dataset, without .bin or .idx",
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=4_000_000,
        help="upper bound of the text (default %(default)s)",
    )
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="folder with *.py files",
    )
    arguments = parser.parse_args()
    documents = list(read_documents(list_documents(arguments.source), arguments.max_bytes))
    if not documents:
        parser.error(
            f"--source {arguments.source} has no *.py file within --max-bytes {arguments.max_bytes}"
        )
    num_tokens = write_dataset(documents, arguments.output_prefix)
    print(f"{len(documents)} documents, {num_tokens} tokens: {arguments.output_prefix}.bin, .idx")


if __name__ == "__main__":
    main()
