"""The model families, one file each; base.py says what a family declares (docs/families.md)."""
