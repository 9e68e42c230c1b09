"""What the documents promise is there: files, links, commands, flags, names, numbers.

Each check returns what is wrong with a text, so that it is tried first on a text that is wrong.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from megatron_adam_mini import cli
from megatron_adam_mini.mcore.arguments import add_arguments
from tests.ranks import run_ranks
from tests.test_imports import MODULES, import_graph, reachable

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_adam_mini"
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "evidence/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
]

#: Files and folders of this project by their endings; other names in backticks may be anything.
PATH = re.compile(r"[\w.*-]+(/[\w.*-]+)*(/|\.(py|md|sh|cpp|inc|toml|txt|patch))|[\w-]+(/[\w*-]+)+")
#: The user's own.
ELSEWHERE = {"pretrain_gpt.py", "train.py", "my_model.py"}
#: Packages whose commands documents name.
OTHERS = {"verl"}
#: Of programs whose flags documents may name.
FOLDERS = ("examples", "benchmarks", "tools", "evidence")
#: Flags of programs whose parsers are not asked: setup.py, git, torchrun, frameworks, train.sh,
#: Slurm, Docker, pip.
OTHER_FLAGS = {"--inplace", "--nproc-per-node", "--help", "--reset-optimizer-states", "--plan"}
OTHER_FLAGS |= {"--nodes", "--build-arg", "--no-deps"}
OTHER_FLAGS |= {"--config-name", "--external_plugins", "--custom-megatron-init-path"}


@dataclass
class Document:
    """A Markdown text: what is in fences by language, the rest, and what is in backticks there."""

    text: str
    name: str = "README.md"

    @property
    def fences(self) -> list[tuple[str, str]]:
        return re.findall(r"^```(\w*)\n(.*?)^```", self.text, re.MULTILINE | re.DOTALL)

    @property
    def prose(self) -> str:
        return re.sub(r"^```.*?^```", "", self.text, flags=re.MULTILINE | re.DOTALL)

    @property
    def code(self) -> list[str]:
        return [" ".join(c.split()) for c in re.findall(r"`([^`]+)`", self.prose)]

    @property
    def links(self) -> list[str]:
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    @property
    def sections(self) -> dict[str, str]:
        """Return the text under each heading by the anchor that GitHub gives it."""
        parts = re.split(r"^#+ (.*)$", self.prose, flags=re.MULTILINE)[1:]
        anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in parts[::2]]
        return dict(zip(anchors, parts[1::2], strict=True))

    @property
    def commands(self) -> list[str]:
        """Return the lines after a ``$``, each in one piece, without comments and environment."""
        console = "\n".join(body for kind, body in self.fences if kind in ("console", "sh"))
        found = re.findall(r"^\$ ((?:.*\\\n)*.*)$", console, re.MULTILINE)
        lines = [re.sub(r"\s#\s.*", "", line.replace("\\\n", " ")) for line in found]
        return [
            re.sub(r"^([A-Z_]+=\S+ )+", "", " ".join(line.split())) for line in (*lines, *self.code)
        ]


def read(name: str) -> Document:
    return Document((ROOT / name).read_text(encoding="utf-8"), name)


# Files, links and names.


def missing_files(document: Document) -> list[str]:
    folder = (ROOT / document.name).parent
    missing = []
    for link in document.links:
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        if not (folder / target).exists() or (not target and anchor not in document.sections):
            missing.append(link)
    for name in {word for code in document.code for word in code.split()} - ELSEWHERE:
        if PATH.fullmatch(name) and not any(
            any(base.glob(name.rstrip("/"))) for base in (ROOT, PACKAGE)
        ):
            missing.append(name)
    return sorted(missing)


def missing_constants(document: Document) -> list[str]:
    """Check ``module.CONSTANT``: one module has that name, and the constant."""
    missing = []
    for code in document.code:
        for name, constant in re.findall(r"^(?:\w+\.)*(\w+)\.([A-Z][A-Z_]+)$", code):
            modules = [*PACKAGE.rglob(f"{name}.py"), *ROOT.glob(f"tests/{name}.py")]
            sources = [path.read_text(encoding="utf-8") for path in modules]
            if not any(re.search(rf"^{constant}\b", text, re.MULTILINE) for text in sources):
                missing.append(code)
    return missing


def broken_python(document: Document) -> list[str]:
    """Check that code blocks compile, and what they import from or call of this package."""
    broken = []
    for kind, source in document.fences:
        if kind != "python":
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            broken.append(f"{error.msg}: {error.text}")
            continue
        names: list[tuple[str, str]] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names += [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names.append((node.value.id, node.attr))
        for module, name in names:
            if module.split(".")[0] != PACKAGE.name:
                continue
            if not importlib.util.find_spec(module):
                broken.append(module)
            elif not has_name(module, name):
                broken.append(f"{module}.{name}")
    return broken


def has_name(module: str, name: str) -> bool:
    """Return whether a module has a name, also if it needs Megatron-Bridge, which is not here."""
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != "megatron.bridge":
            raise
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


# Commands and flags.


def adam_mini_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["adam"])
    return add_arguments(parser)


def options_of(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the actions of a parser and of its commands by option."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        found |= dict.fromkeys(action.option_strings, action)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= options_of(command)
    return found


def wrong_commands(document: Document) -> list[str]:
    """Check the commands that are ours: targets of make, subcommands and modules, with flags."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wrong = []
    for command in document.commands:
        program, *rest = shlex.split(command.split(" | ")[0], posix=False) or [""]
        try:
            if program == "make" and rest and rest[0].isidentifier():
                assert rest[0] in targets, "no such target"
            elif program == "megatron-adam-mini":
                check_cli(command)
            elif program.endswith("python") or program == "torchrun":
                check_python(rest)
        except (AssertionError, SystemExit) as error:
            wrong.append(f"{command}: {error}")
    return wrong


def check_cli(command: str) -> None:
    parser = cli._parser()
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    text = re.sub(r"[\[\]]|\.\.\.", "", command).split(maxsplit=1)[1:]
    for part in text[0].split(" | ") if text else []:
        name, *arguments = shlex.split(part)
        assert name in commands.choices, f"no command {name!r}"
        if arguments:
            parser.parse_args([name, *arguments])


def check_python(words: list[str]) -> None:
    """Check modules and scripts of this repository in the arguments of python or torchrun."""
    for flag, module in zip(["", *words], words, strict=False):
        if flag == "-m":
            known = module.split(".")[0] in OTHERS
            assert known or importlib.util.find_spec(module), f"no module {module}"
        elif module.endswith(".py"):
            assert module in ELSEWHERE or (ROOT / module).exists(), f"no file {module}"


def flags_of_megatron() -> list[str]:
    """Return what Megatron's parser knows; it needs a rank, where Megatron is imported."""
    from megatron.training.arguments import add_megatron_arguments

    return list(options_of(add_megatron_arguments(argparse.ArgumentParser())))


@cache
def known_flags() -> set[str]:
    (found,) = run_ranks(1, flags_of_megatron)
    known = {*found, *options_of(adam_mini_parser()), *options_of(cli._parser()), *OTHER_FLAGS}
    sources = (ROOT.glob(f"{folder}/**/*.py") for folder in FOLDERS)
    for path in (PACKAGE / "launch.py", *chain.from_iterable(sources)):
        known |= set(re.findall(r'"(--[\w-]+)"', path.read_text()))
    for path in (ROOT / "tools").glob("*.sh"):
        known |= set(re.findall(r"^ +(--[\w-]+)\)$", path.read_text(), re.MULTILINE))
    return known


def flags_in(document: Document) -> set[str]:
    words = " ".join((*document.commands, *document.code))
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*(?![\w*-])", words))


def wrong_values(document: Document) -> list[str]:
    """Check ``--adam-mini-flag value`` where a flag has choices; capitals stand for any value."""
    options = options_of(adam_mini_parser())
    wrong = []
    for code in document.code:
        flag, *values = code.split()
        choices = options[flag].choices if flag in options else None
        if choices and values and values[0].islower() and values[0] not in choices:
            wrong.append(code)
    return wrong


# Numbers.


def unknown_numbers(document: Document, part: str | None = None) -> list[str]:
    """Look for the numbers of each paragraph in the results files that it links to.

    docs/memory.md counts as one: its numbers are outputs of the command, which tests/test_memory.py
    compares. A link to a section stands for the files that are linked there. A number may be
    rounded, and a percentage may be the ratio of two numbers of one row.
    """
    unknown = []
    for paragraph in re.split(r"\n\s*\n", part or document.prose):
        targets = re.findall(r"\]\((?:#([^)]*)|[^)]*)\)", paragraph)
        linked = "".join([paragraph, *(document.sections.get(target, "") for target in targets)])
        results = re.findall(r"\]\((benchmarks/results/[^)]*\.md|docs/memory\.md)\)", linked)
        if not results:
            continue
        rows = "\n".join((ROOT / name).read_text() for name in results).splitlines()
        numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(row)] for row in rows]
        ratios = {100 * a / b for row in numbers for a in row for b in row if b}
        plain = {number for row in numbers for number in row}
        for text, percent in re.findall(rf"(?<![\w.-])({NUMBER.pattern})( %)?(?![\w-])", paragraph):
            digits = len(text.partition(".")[2])
            known = {round(number, digits) for number in plain | (ratios if percent else set())}
            if float(text.replace(",", "")) not in known:
                unknown.append(text + percent)
    return unknown


NUMBER = re.compile(r"\d[\d,]*\.\d+")


def first_screen(document: Document) -> str:
    return document.prose.split("\n## ")[0]


# The tests.

CHECKS = [missing_files, missing_constants, broken_python, wrong_commands, wrong_values]

WRONG = Document("""
# A title
[gone](docs/gone.md), [nowhere](#no-heading), [here](#a-title), `tests/test_gone.py`,
`mcore/gone.py`, `plan/`, `kernels/triton_*`, `config.GONE`, `config.PRESETS`, `make gone`,
`make test`, `megatron-adam-mini inspect | explode`, `--adam-mini-gone`,
`--adam-mini-preset newspaper`, `--adam-mini-preset paper`, `--adam-mini-*`

```console
$ megatron-adam-mini verify CKPT [--json] --gone   # a comment
$ megatron-adam-mini memory --model llama-2-7b \\
      --tensor-model-parallel-size two
$ ENVIRONMENT=x python -m benchmarks.gone --no-file
$ torchrun --nproc-per-node 2 -m megatron_adam_mini.launch examples/gone.py ...
```

```python
import megatron_adam_mini
from megatron_adam_mini.config import AdamMiniConfig, Gone

megatron_adam_mini.gone()
```

```python
this is no Python
```

**50.3 %** and **50.9 %** of 0.71, 0.98 [results](#measured)

## Measured

[results](benchmarks/results/2026-11-22-demo.md)
""")


def test_the_checks_see_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert missing_files(WRONG) == [
        "#no-heading",
        "docs/gone.md",
        "mcore/gone.py",
        "tests/test_gone.py",
    ]
    assert missing_constants(WRONG) == ["config.GONE"]
    assert broken_python(WRONG)[:2] == [
        "megatron_adam_mini.config.Gone",
        "megatron_adam_mini.gone",
    ]
    assert len(broken_python(WRONG)) == 3
    assert [command.split(":")[0] for command in wrong_commands(WRONG)] == [
        "megatron-adam-mini verify CKPT [--json] --gone",
        "megatron-adam-mini memory --model llama-2-7b --tensor-model-parallel-size two",
        "python -m benchmarks.gone --no-file",
        "torchrun --nproc-per-node 2 -m megatron_adam_mini.launch examples/gone.py ...",
        "make gone",
        "megatron-adam-mini inspect | explode",
    ]
    capsys.readouterr()
    assert wrong_values(WRONG) == ["--adam-mini-preset newspaper"]
    assert {"--adam-mini-gone", "--gone", "--json", "--adam-mini-preset"} <= flags_in(WRONG)
    assert "--adam-mini-" not in flags_in(WRONG)
    assert unknown_numbers(WRONG) == ["50.9 %", "0.71", "0.98"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("make demo", "make dome"),
        ("`tests/test_oracle.py`", "`tests/test_oracles.py`"),
        ("`plan/segments.py`", "`segments.py`"),
        ("](docs/memory.md)", "](memory.md)"),
        ("megatron_adam_mini.register()", "megatron_adam_mini.registered()"),
        ("-m megatron_adam_mini.launch", "-m megatron_adam_mini.launcher"),
        ("`--adam-mini-preset paper`", "`--adam-mini-preset papers`"),
    ],
)
def test_the_checks_see_what_is_wrong_in_the_readme(old: str, new: str) -> None:
    text = read("README.md").text
    assert old in text
    document = Document(text.replace(old, new))
    assert sum(len(check(document)) for check in CHECKS) > 0


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("check", CHECKS)
def test_what_documents_name_is_there(check: Any, name: str) -> None:
    assert check(read(name)) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_flags_of_documents_exist(name: str) -> None:
    assert flags_in(read(name)) - known_flags() == set()


def test_flags_that_do_not_exist_are_seen() -> None:
    assert flags_in(WRONG) - known_flags() == {"--adam-mini-gone", "--gone"}


def test_every_flag_is_documented() -> None:
    named = set().union(*(flags_in(read(name)) for name in DOCUMENTS))
    ours = {flag for flag in options_of(adam_mini_parser()) if flag.startswith("--adam-mini")}
    assert len(ours) > 10
    assert ours <= named


def test_readme_has_commands_to_check() -> None:
    """Or the tests above might pass because they find none."""
    document = read("README.md")
    commands = document.commands
    for program in ("make demo", "make test", "torchrun", "megatron-adam-mini memory"):
        assert any(command.startswith(program) for command in commands), program
    assert any(kind == "python" for kind, _ in document.fences)
    assert sum(name.startswith("tests/test_") for name in document.code) > 10


def test_numbers_of_the_first_screen_are_measured() -> None:
    document = read("README.md")
    screen = first_screen(document)
    assert "](benchmarks/results/" in screen
    assert NUMBER.search(screen)
    assert unknown_numbers(document, screen) == []


def test_reading_order_is_the_order_of_imports() -> None:
    """A file that is to be read first imports nothing that comes later."""
    section = read("README.md").sections["read-the-code-in-this-order"]
    order = re.findall(r"^\d\. `([\w/.]+)`", section, re.MULTILINE)
    assert len(order) >= 5
    assert set(order) <= set(MODULES)
    for index, module in enumerate(order):
        assert not reachable(import_graph(), module) & set(order[index + 1 :]), module


def test_versions_are_those_that_are_installed() -> None:
    runtime = (ROOT / "requirements/runtime.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", runtime, re.MULTILINE))
    row = re.search(r"^\| Megatron-Core ([\d.]+), torch ([\d.]+) \|", read("README.md").text, re.M)
    assert row is not None
    assert row[1] == pins["megatron-core"]
    assert pins["torch"].startswith(row[2] + ".")
