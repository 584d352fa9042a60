"""`import vlmfx` is cheap: it loads none of the large packages, which come with the first function that needs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def in_a_new_interpreter(code: str) -> str:
    """What `code` prints in a Python of its own: this one has imported torch long ago."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_vlmfx_loads_no_large_package():
    loaded = set(json.loads(in_a_new_interpreter("import json, sys, vlmfx; print(json.dumps(list(sys.modules)))")))
    assert "vlmfx" in loaded
    assert loaded & {"torch", "numpy", "transformers", "PIL", "llguidance"} == set()


def test_llguidance_comes_with_the_first_grammar():
    code = "import sys, vlmfx.llm, vlmfx.engine.token_rules, vlmfx.engine.grammar; print('llguidance' in sys.modules)"
    assert in_a_new_interpreter(code).strip() == "False"


def test_version_is_that_of_pyproject():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', pyproject, flags=re.MULTILINE)
    assert in_a_new_interpreter("import vlmfx; print(vlmfx.__version__)").strip() == version
