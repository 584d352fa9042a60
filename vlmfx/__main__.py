"""`python -m vlmfx` is the `vlmfx` command."""

import sys

from vlmfx.cli import main

sys.exit(main())
