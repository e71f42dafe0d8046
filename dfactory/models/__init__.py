"""Families, attention, scores, saving."""

import dfactory.distributed  # noqa: F401  first, because it settles DeepSpeed's accelerator
