"""What Megatron's optimizers offer and who reads it, found in its source; our document of both.

* ``members_of`` walks a class: methods, properties, class attributes, attributes set on ``self``;
* ``Readers`` walks a Megatron tree for whatever is read of an expression called an optimizer;
* ``tables`` parses the tables of ``docs/megatron-contract.md``.

``python -m tests.contract FOLDER`` compares the document with a Megatron-LM tree, of which the
wheel of Megatron-Core lacks ``megatron.rl``.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[1] / "docs" / "megatron-contract.md"

#: Letters of the document's column "of".
CLASSES = {
    "M": "MegatronOptimizer",
    "P": "MixedPrecisionOptimizer",
    "D": "DistributedOptimizer",
    "C": "ChainedOptimizer",
}
#: Packages whose readers the document names.
PACKAGES = {"core", "training", "rl"}
#: The optimizers themselves, and Megatron-FSDP, which has optimizers of its own.
LEFT_OUT = re.compile(r"core/optimizer/|.*fsdp")

#: What an expression is called that is an optimizer, or a list of them.
OPTIMIZER = re.compile(r"(.*_)?(optimizer|opt|optim)(_instance)?_?")
OPTIMIZERS = re.compile(r"(.*_)?(optimizers|opts|optims)_?")
#: ``config.optimizer`` is a config or a name, ``torch.optim`` a module.
NO_OWNERS = {"args", "cfg", "config", "core", "megatron", "torch"}


# Megatron's classes.


def members_of(kind: type) -> set[str]:
    """Return the names that a class itself defines, without Python's own."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    names = {*vars(kind), *_stored_on({"self"}, tree)}
    return {name for name in names if not name.startswith("__") and name != "_abc_impl"}


def _stored_on(owners: set[str], tree: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id in owners
    }


def members_by_class() -> dict[str, set[str]]:
    """Walk Megatron's classes, by the letters of the document; needs a rank, which has Megatron."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer import optimizer as base

    found: dict[str, set[str]] = {"param": set()}
    for letter, name in CLASSES.items():
        kind = getattr(base, name, None) or getattr(distrib_optimizer, name)
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        found[letter] = members_of(kind)
        found["param"] |= _stored_on({"param", "model_param"}, tree) - {"grad"}
    found["set"] = {
        name
        for what, name, node in reads(ast.parse(inspect.getsource(optimizer)))
        if what == "setattr" and isinstance(node.args[0], ast.Name)
    }
    return found


# Megatron's readers.


@dataclass
class Readers:
    """What the modules of a Megatron tree read of optimizers: modules by name.

    Attributes:
        names: attributes, also those asked for by ``hasattr`` and the like.
        types: classes asked for by ``isinstance``.
        keys: keys of parameter groups.
        by_name: for each attribute, where anything at all has one of that name: module,
            expression, and whether it is in ``names``.
    """

    names: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    types: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    keys: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    by_name: dict[str, set[tuple[str, str, bool]]] = field(default_factory=lambda: defaultdict(set))

    @classmethod
    def of(cls, root: Path) -> Readers:
        """Walk the tree whose folder ``megatron`` is ``root``."""
        found = cls()
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if name.split("/")[0] in PACKAGES and not LEFT_OUT.match(name):
                module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                found.add(module, path.read_text(encoding="utf-8"))
        return found

    def add(self, module: str, source: str) -> None:
        if not re.search(r"opt|param_group|main_param", source):
            return
        with warnings.catch_warnings(action="ignore"):  # about escapes in Megatron's strings
            tree = ast.parse(source)
        kinds = defaultdict(lambda: self.names, type=self.types, key=self.keys)
        seen = set()
        for what, name, node in reads(tree):
            kinds[what][name].add(module)
            seen |= {node} if kinds[what] is self.names else set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                self.by_name[node.attr].add((module, ast.unparse(node), node in seen))
            elif asked := _asked_for(node):
                self.by_name[asked[2]].add((module, ast.unparse(node), node in seen))


def reads(tree: ast.AST) -> Iterator[tuple[str, str, Any]]:
    """Yield what is read of an optimizer: ``attribute``, ``hasattr``..., ``type`` or ``key``.

    Returns:
        That, the name, and the node.
    """
    members = {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.For | ast.comprehension)
        and isinstance(node.target, ast.Name)
        and OPTIMIZERS.fullmatch(_called(node.iter))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if _is_optimizer(node.value, members) or _called(node.value) in CLASSES.values():
                yield "attribute", node.attr, node
        elif asked := _asked_for(node):
            how, owner, name = asked
            if _is_optimizer(owner, members):
                yield how, name, node
        elif isinstance(node, ast.Call) and node.args and _called(node.func) == "isinstance":
            kinds = getattr(node.args[1], "elts", [node.args[1]])
            owned = _is_optimizer(node.args[0], members)
            yield from (("type", _called(kind), node) for kind in kinds if owned)
        key = _key_of_group(node)
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield "key", key.value, node


def _asked_for(node: ast.AST) -> tuple[str, ast.AST, str] | None:
    """Return function, object and name of ``hasattr(object, "name")`` and the like."""
    if isinstance(node, ast.Call) and len(node.args) > 1:
        how, (owner, name, *_) = _called(node.func), node.args
        if how in ("hasattr", "getattr", "setattr", "delattr") and isinstance(name, ast.Constant):
            return how, owner, name.value
    return None


def _key_of_group(node: ast.AST) -> ast.AST | None:
    """Return the key in ``param_group[key]``, ``param_group.get(key)``, ``key in param_group``."""
    owner: ast.AST | None = None
    key: ast.AST | None = None
    if isinstance(node, ast.Subscript):
        owner, key = node.value, node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        owner, key = node.func.value, node.args[0]
    elif isinstance(node, ast.Compare):
        owner, key = node.comparators[0], node.left
    return key if _called(owner) == "param_group" else None


def _called(node: ast.AST | None) -> str:
    return getattr(node, "id", "") or getattr(node, "attr", "")


def _is_optimizer(node: ast.AST, members: set[str]) -> bool:
    if isinstance(node, ast.Subscript):
        return bool(OPTIMIZERS.fullmatch(_called(node.value)))
    if isinstance(node, ast.Attribute) and _called(node.value) in NO_OWNERS:
        return False
    return _called(node) in members or bool(OPTIMIZER.fullmatch(_called(node)))


# The document.

HEADER = ["name", "of", "ours", "read by"]
VERDICTS = ("same", "different", "refused")


@dataclass(frozen=True)
class Row:
    """One line of a table: a name, who defines it, what ours does, and who reads it."""

    name: str
    of: frozenset[str]
    verdict: str
    text: str
    read_by: frozenset[str]

    def __str__(self) -> str:
        return f"{self.name}-{''.join(sorted(self.of))}"

    @property
    def message(self) -> str:
        """What a refusal raises: the type, a colon, and how the message begins."""
        (message,) = re.findall(r"`(\w+: [^`]*)`", self.text)
        return str(message)


def tables(text: str) -> list[Row]:
    """Return the rows of all tables with the columns of ``HEADER``."""
    rows = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells or cells == HEADER:
            inside = bool(cells)
        elif inside and not set(cells[0]) <= {"-"}:
            name, of, ours, read_by = cells
            verdict, _, rest = ours.partition(":")
            places = frozenset(re.findall(r"`([^`]*)`", read_by))
            rows.append(Row(name.strip("`"), frozenset(of.split()), verdict, rest.strip(), places))
    return rows


def wrong_readers(rows: list[Row], found: Readers, packages: set[str]) -> list[str]:
    """Compare the column "read by" with what was found, for modules of some packages."""
    wrong = []
    documented: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        kind = next((kind for kind in ("type", "group", "param") if kind in row.of), "name")
        documented[kind, row.name] = {p for p in row.read_by if p.split(".")[0] in packages}
    actual = {("name", name): modules for name, modules in found.names.items()}
    actual |= {("type", name): modules for name, modules in found.types.items()}
    actual |= {("group", name): modules for name, modules in found.keys.items()}
    for kind, name in documented:
        if kind == "param":
            actual[kind, name] = {module for module, _, _ in found.by_name[name]}
    for kind, name in sorted({*documented, *actual}):
        if (kind, name) not in documented:
            wrong.append(f"{name} ({kind}) has no line; {sorted(actual[kind, name])} read it")
            continue
        there, here = actual.get((kind, name), set()), documented[kind, name]
        if there != here:
            wrong.append(
                f"{name} ({kind}): {sorted(here)} in the document, read by {sorted(there)}"
            )
    return wrong


if __name__ == "__main__":
    megatron = Path(sys.argv[1]) / "megatron"
    lines = tables(DOCUMENT.read_text(encoding="utf-8"))
    print("\n".join(wrong_readers(lines, Readers.of(megatron), PACKAGES)) or "as in the document")
