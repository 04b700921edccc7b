"""Versions of what decides the numbers, for what is recorded beside them."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = ("cluster-clip", "torch", "deepspeed", "numpy", "simplejpeg", "sentencepiece", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES if _is_installed(name)}
    return {"python": platform.python_version(), **found}


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
