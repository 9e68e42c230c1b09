"""The documents as a site, without building it; `make docs` fails on all this, and on more."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import megatron_adam_mini
from tests.test_readme import DOCUMENTS, ROOT, read

SITE = ROOT / "docs/site"
INDEX = (SITE / "index.md").read_text(encoding="utf-8")


def pages() -> set[str]:
    """Return the documents that the site has, besides its own."""
    patterns = runpy.run_path(str(SITE / "conf.py"))["include_patterns"]
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.suffix == ".md"}
    return {path.relative_to(ROOT).as_posix() for path in found if path.parent != SITE}


def listed() -> set[str]:
    """Return the documents in the tables of contents of the index."""
    tables = re.findall(r"^```\{toctree\}\n(.*?)^```", INDEX, re.MULTILINE | re.DOTALL)
    names = [line for table in tables for line in table.splitlines() if line[:1] not in ("", ":")]
    found = {path.resolve() for name in names for path in SITE.glob(f"{name}.md")}
    return {path.relative_to(ROOT).as_posix() for path in found if path.parent != SITE}


def test_every_document_is_in_a_table_of_contents() -> None:
    assert set(DOCUMENTS) <= pages()
    assert listed() == pages()


@pytest.mark.parametrize("name", sorted(pages()))
def test_links_lead_to_files_and_headings(name: str) -> None:
    document = read(name)
    for link in document.links:
        target, _, anchor = link.partition("#")
        if "://" in link or not target:
            continue
        path = (ROOT / name).parent / target
        assert path.is_file(), f"{link}: a site has no page for a folder"
        if anchor:
            assert anchor in read(path.resolve().relative_to(ROOT).as_posix()).sections, link


def test_public_names_say_what_they_are() -> None:
    assert all(getattr(megatron_adam_mini, name).__doc__ for name in megatron_adam_mini.__all__)


def test_versions_are_pinned() -> None:
    lines = Path(ROOT, "docs/requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines if line[0] != "#")
