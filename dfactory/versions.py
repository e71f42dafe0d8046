"""Versions of installed packages."""

import importlib.metadata


def version_of(package: str) -> str:
    """`unknown` for a checkout that is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
