"""Decoding rules, one file each; base.py says what a rule is (docs/decoding.md)."""
