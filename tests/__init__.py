"""Tests, laid out as the package is. `tests.reference` holds slow, obvious versions of the fast code."""
