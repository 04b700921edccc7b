"""Versions of what decides the numbers, for what is recorded beside them."""

from __future__ import annotations

import platform

from formats.manifest import version_of

_PACKAGES = ("cluster-clip", "torch", "deepspeed", "numpy", "simplejpeg", "sentencepiece", "tokenizers")


def versions() -> dict[str, str]:
    """Of Python, and of the packages that are installed."""
    found = {name: version_of(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **{name: at for name, at in found.items() if at != "unknown"}}
