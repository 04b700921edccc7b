"""Versions of packages, for what is recorded beside data."""

from __future__ import annotations

import importlib.metadata


def version_of(package: str) -> str:
    """The installed version; "unknown" for what is only there as a checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
