"""`PrunePlan` and its edits by their usual name. Their home is `depthprune_runtime.plan`: checkpoints hold plans."""

from depthprune_runtime.plan import Drop, Edit, Flatten, Narrow, PrunePlan

__all__ = ["Drop", "Edit", "Flatten", "Narrow", "PrunePlan"]
