"""`vlmfx export` as a script: a model compiled ahead of time, into a folder that runs without a compiler.

python scripts/export_graph.py MODEL OUT [--plan PLAN] [--device cpu|cuda] [--dtype DTYPE] [--march MARCH] ..."""

from __future__ import annotations

import sys

from vlmfx.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
