"""Arrays in `.npy` files: written whole or not at all, mapped into memory, never unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.errors import UserError
from formats.files import replacing
from formats.manifest import Shard


def array_path(directory: Path, shard: Shard) -> Path:
    """Where the array of a shard is in a folder that has one for each: `00000.npy` for 00000.tar."""
    return directory / f"{Path(shard.name).stem}.npy"


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array, atomically."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)


def map_array(path: Path) -> npt.NDArray[Any]:
    """A file's array; a page of it is read when it is used. Raises UserError for a damaged one, OSError for none."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # whatever numpy makes of a damaged file
        raise UserError(f"{path} is not an array of numbers ({error}): delete it and make it again") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds several arrays: save one alone with numpy.save")
    return array
