"""Whether a decoder of transformers that no family declares computes what it has to under the visibility rule."""

from dfactory.models.selfcheck.check import Checked, self_check
from dfactory.models.selfcheck.parts import UNFIT, Unfit
from dfactory.models.selfcheck.small import shrink

__all__ = ["UNFIT", "Checked", "Unfit", "self_check", "shrink"]
