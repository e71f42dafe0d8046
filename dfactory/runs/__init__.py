"""A run: its folder, who holds it, its metrics and trackers, its sanity checks and what it decodes at evaluations."""

import dfactory.distributed  # noqa: F401  first, because it settles DeepSpeed's accelerator
