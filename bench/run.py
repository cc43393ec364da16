"""``python bench/run.py``: see docs/benchmarks.md."""

import sys
from pathlib import Path

# Run as a script: import from this checkout, not from this directory.
sys.path[0] = str(Path(__file__).parents[1])

from bench.command import main  # noqa: E402

if __name__ == "__main__":
    main()
