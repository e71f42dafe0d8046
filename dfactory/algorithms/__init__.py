"""What is optimised: one file for each algorithm, with its keys, the rules between them and its arithmetic.

base.py has the seam; supervised.py, rollouts.py and policy_gradient.py what several algorithms share. To add one, write a
file here, or a package with an entry point in the group `dfactory.algorithms` (docs/extending.md).
"""

from dfactory.algorithms.base import ALGORITHMS, Algorithm, Data, Needs

__all__ = ["ALGORITHMS", "Algorithm", "Data", "Needs"]
