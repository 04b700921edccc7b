"""The language of a caption, for lists that do not say it; py3langid is an optional extra."""

from __future__ import annotations

import pyarrow as pa

from formats.errors import UserError


def check_detector() -> None:
    """Raise UserError when py3langid is not installed."""
    try:
        import py3langid  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--language on a list without a language column needs py3langid: pip install 'cluster-clip[language]'"
        ) from error


def detect_languages(captions: pa.ChunkedArray) -> pa.Array:
    """ISO 639-1 codes guessed by py3langid, 20 us a caption; short captions are often guessed wrong."""
    check_detector()
    import py3langid

    return pa.array([py3langid.classify(text)[0] for text in captions.to_pylist()], pa.string())
