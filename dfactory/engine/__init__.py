"""DeepSpeed, the one division, checkpoints, the run folder."""

import dfactory.models  # noqa: F401  first, because it settles DeepSpeed's accelerator
