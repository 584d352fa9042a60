"""What families share is written once: no two functions of models/ and processing/ do the same."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "vlmfx"


def bodies(source: str) -> dict[str, str]:
    """Function → its statements after the docstring; those that call a function of their own module are not of interest."""
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    found = {}
    for name, node in functions.items():
        rest = node.body[1:] if ast.get_docstring(node) else node.body
        used = {inner.id for statement in rest for inner in ast.walk(statement) if isinstance(inner, ast.Name)}
        if not used & functions.keys():
            found[name] = "\n".join(map(ast.unparse, rest))
    return found


def test_no_body_is_written_twice():
    places = defaultdict(list)
    for path in sorted([*(PACKAGE / "models").glob("*.py"), *(PACKAGE / "processing").glob("*.py")]):
        for name, body in bodies(path.read_text(encoding="utf-8")).items():
            places[body].append(f"{path.parent.name}/{path.name}: {name}")
    assert len(places) > 100
    assert [where for where in places.values() if len(where) > 1] == []


def test_types_and_docstrings_do_not_hide_a_copy():
    one = 'def f(x: int) -> int:\n    """One."""\n    return g(x)'
    other = 'def h(x: float) -> float:\n    """Other."""\n    return g(x)'
    assert list(bodies(one).values()) == list(bodies(other).values()) == ["return g(x)"]
    assert bodies(f"{one}\n\n\ndef g(x):\n    return x") == {"g": "return x"}
