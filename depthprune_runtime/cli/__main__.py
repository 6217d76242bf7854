"""`python -m depthprune_runtime.cli`."""

import sys

from depthprune_runtime.cli import main

sys.exit(main())
