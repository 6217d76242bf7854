"""`python -m depthprune_runtime`."""

import sys

from depthprune_runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
