"""Imports inside vlmfx go downwards only, by one table; the package itself imports nothing until it is used."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A name is a module of vlmfx or a package with all that is in it. Names on one line do not import each other, except
# that "+" joins modules which work as one. ARCHITECTURE.md shows the same table.
LAYERS = """
cli + terminal + batch + replay + __main__
server | llm + offline + options
parity | doctor | export + export_jobs | openai
engine
checkpoint + hub
weight_files | pooling_config | float16_range
processing | compile
models
ops
weights | device | folder
tree | errors | assets
"""

LINES = LAYERS.strip().splitlines()
# name → (line from the top, which of the names joined on that line)
PLACE = {
    name: (depth, group)
    for depth, line in enumerate(LINES)
    for group, joined in enumerate(line.split(" | "))
    for name in joined.split(" + ")
}
MAY_IMPORT_TRANSFORMERS = ("cli", "server", "llm")


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name in full, as "vlmfx.ops.norm.rms_norm"."""

    target: str
    line: int
    function: str | None  # the outermost function it is in: it runs when that is called, not at import
    is_typing: bool  # under `if TYPE_CHECKING`: it never runs

    @property
    def is_at_import(self) -> bool:
        return self.function is None and not self.is_typing


def imports(tree: ast.AST, package: str) -> Iterator[Import]:
    """Every import below `tree`, wherever it stands; `package` is what a relative import starts from."""

    def is_type_checking(test: ast.expr) -> bool:
        return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")

    def walk(node: ast.AST, function: str | None, is_typing: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                targets = [alias.name for alias in node.names]
            case ast.ImportFrom():
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                targets = [f"{base}.{alias.name}" for alias in node.names]
            case _:
                targets = []
        for target in targets:
            yield Import(target=target, line=getattr(node, "lineno", 0), function=function, is_typing=is_typing)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = function or node.name
        typed = node.body if isinstance(node, ast.If) and is_type_checking(node.test) else []
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function, is_typing or child in typed)

    return walk(tree, None, False)


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of `module` ("vlmfx.ops.norm"), one sentence each; [] when nothing is."""
    found = list(imports(ast.parse(source), module if is_package else module.rpartition(".")[0]))
    if module == "vlmfx":
        return [
            f"vlmfx/__init__.py:{i.line} imports {i.target} at once; move it into `__getattr__` or under TYPE_CHECKING."
            for i in found
            if not (i.is_typing or i.function == "__getattr__" or i.target.split(".")[0] in sys.stdlib_module_names)
        ]
    name = module.split(".")[1]
    own = [(i, (i.target + ".").split(".")[1]) for i in found if i.target.split(".")[0] == "vlmfx"]
    if name not in PLACE:
        lowest = min((PLACE[other][0] for _, other in own if other in PLACE), default=len(LINES))
        where = f"above `{LINES[lowest]}`, which it imports" if lowest < len(LINES) else f"in the last, `{LINES[-1]}`"
        return [
            f"vlmfx.{name} is in no layer: name it in LAYERS (tests/test_layering.py) and in ARCHITECTURE.md, "
            f"in a line {where}."
        ]
    depth, group = PLACE[name]
    wrong = []
    for i, other in own:
        at = f"{module}:{i.line} imports {i.target}"
        if other not in PLACE:  # the package itself, or one of its lazy exports, which live in the layers on top
            if name != "cli" and other != "__version__":
                wrong.append(f"{at} from the top of the package; import it from the module that defines it.")
        elif other != name and PLACE[other] != (depth, group) and PLACE[other][0] <= depth:
            how = "beside" if PLACE[other][0] == depth else "above"
            wrong.append(f"{at}, but `{other}` is {how} `{name}`; move what both need to a lower layer.")
    if name not in MAY_IMPORT_TRANSFORMERS:
        wrong += [
            f"{module}:{i.line} imports transformers when it is itself imported; do it in the function that uses it."
            for i in found
            if i.is_at_import and i.target.split(".")[0] == "transformers"
        ]
    return wrong


@pytest.mark.parametrize("path", sorted((ROOT / "vlmfx").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_downwards(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert violations(module, path.read_text(encoding="utf-8"), is_package=is_package) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vlmfx.ops.norm", "from vlmfx.models.llama import forward"),
        ("vlmfx.ops.norm", "import vlmfx.models.llama"),
        ("vlmfx.ops.norm", "from vlmfx import models"),
        ("vlmfx.ops.norm", "from ..models import llama"),
        ("vlmfx.ops.norm", "from .. import models"),
        ("vlmfx.ops.norm", "def f():\n    def g():\n        import vlmfx.engine"),
        ("vlmfx.models.llama", "class A:\n    async def f(self):\n        from vlmfx.llm import LLM"),
        ("vlmfx.tree", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vlmfx.weights import ParamSpec"),
        ("vlmfx.processing.prompt", "import vlmfx.compile.buckets"),
        ("vlmfx.compile.buckets", "from vlmfx.processing import prompt"),
        ("vlmfx.weights", "from vlmfx import device"),
        ("vlmfx.server.app", "from vlmfx.llm import LLM"),
        ("vlmfx.engine.runner", "from vlmfx import LLM"),
        ("vlmfx.engine.runner", "import vlmfx"),
        ("vlmfx.processing.prompt", "try:\n    import transformers.models\nexcept ImportError:\n    raise"),
        ("vlmfx", "from vlmfx.llm import generate"),
        ("vlmfx", "from .llm import generate"),
        ("vlmfx", "import torch"),
        ("vlmfx", "def generate():\n    from vlmfx.llm import generate"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert len(violations(module, source, is_package=module == "vlmfx")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vlmfx.ops.norm", "from vlmfx.ops.registry import register\nfrom . import rotary\nfrom vlmfx import errors"),
        ("vlmfx.ops.norm", "from vlmfx import __version__\nimport torch, vlmfxtras.models"),
        ("vlmfx.checkpoint", "from vlmfx import hub\nfrom vlmfx.processing import images"),
        ("vlmfx.hub", "from vlmfx.checkpoint import load"),
        ("vlmfx.cli", "import vlmfx\nfrom vlmfx import LLM, server"),
        ("vlmfx.llm", "import transformers"),
        ("vlmfx.models.llama", "def oracle():\n    import transformers"),
        ("vlmfx", "import importlib\ndef __getattr__(name):\n    from vlmfx import llm"),
        ("vlmfx", "import typing\nif typing.TYPE_CHECKING:\n    from vlmfx.llm import LLM as LLM"),
    ],
)
def test_a_right_import_is_not(module, source):
    assert violations(module, source, is_package=module == "vlmfx") == []


def test_the_branch_that_runs_is_not_taken_for_types():
    found = imports(ast.parse("if TYPE_CHECKING:\n    import a\nelse:\n    import b"), "vlmfx")
    assert {i.target: i.is_typing for i in found} == {"a": True, "b": False}


def test_a_module_in_no_layer_is_told_where_to_go():
    (message,) = violations("vlmfx.tracing", "from vlmfx.models import llama\nfrom vlmfx import errors")
    assert "vlmfx.tracing is in no layer" in message
    assert "above `models`" in message
    (message,) = violations("vlmfx.tracing", "import torch")
    assert "in the last, `tree | errors | assets`" in message


def test_architecture_shows_the_same_table():
    assert f"```{LAYERS}```" in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
