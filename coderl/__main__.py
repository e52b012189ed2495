"""``python -m coderl``: the same as the ``coderl`` command."""

from __future__ import annotations

import sys

from coderl.cli import main

if __name__ == "__main__":
    sys.exit(main())
