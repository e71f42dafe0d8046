"""The former name of `dfactory.noise`; it goes in the next release."""

import warnings

from dfactory import noise
from dfactory.noise import *  # noqa: F403

__all__ = noise.__all__

warnings.warn("dfactory.views is now dfactory.noise: import from there", DeprecationWarning, stacklevel=2)
