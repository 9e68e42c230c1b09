"""Configuration of Sphinx for `make docs`: the documents as they lie in the repository, and an API.

Sources are the repository's root, so that links between documents are those that GitHub follows.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

project = "megatron-adam-mini"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/site/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "docs/site/*.md",
    "benchmarks/results/*",
    "examples/**/README.md",
    "evidence/README.md",
    "patches/README.md",
]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
# The environment of `make docs` has none of them.
autodoc_mock_imports = ["megatron", "numpy", "torch", "tqdm"]

html_theme = "furo"
html_title = project
html_extra_path = ["root"]  # leads from the root of the site to its index
