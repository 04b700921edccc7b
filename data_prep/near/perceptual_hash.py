"""A 64-bit hash of what a picture looks like: near-duplicates differ in few bits.

The picture is shrunk to 32 x 32 grey pixels; a bit says whether one of the 64 lowest frequencies of its cosine
transform, the mean left out, is positive. The idea is that of pHash (C. Zauner, "Implementation and Benchmarking of
Perceptual Image Hash Functions", 2010), the choice of frequencies is ours. Scaling, re-encoding and small changes of
brightness and contrast leave the hash nearly as it is; cropping, rotating and mirroring do not.

N pictures, S = 32 pixels a side
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from formats.pictures import decode_picture, read_header, upright

HASH_VERSION = 2  # hashes of different versions cannot be compared
SIDE = 32
BITS = 64
# in grey levels, of the orthonormal transform: pictures without content have no frequency above it and hash to 0
_NOISE = 4.0


def _lowest_frequencies() -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rows and columns of the 64 lowest frequencies in zigzag order, without (0, 0)."""
    places = sorted(((row, column) for row in range(SIDE) for column in range(SIDE)), key=lambda at: (sum(at), at))
    rows, columns = np.array(places[1 : BITS + 1]).T
    return rows, columns


def _cosines() -> npt.NDArray[np.float32]:
    """The orthonormal DCT-II as a matrix [S, S]."""
    frequency_S, position_S = np.arange(SIDE)[:, None], np.arange(SIDE)
    matrix_SS = np.cos(np.pi / SIDE * frequency_S * (position_S + 0.5)) * np.sqrt(2 / SIDE)
    matrix_SS[0] /= np.sqrt(2)
    return np.asarray(matrix_SS, np.float32)


_ROWS, _COLUMNS = _lowest_frequencies()
_COSINES_SS = _cosines()
_WEIGHTS = np.uint64(1) << np.arange(BITS, dtype=np.uint64)


def shrink(data: bytes) -> npt.NDArray[np.uint8]:
    """An encoded picture as [S, S] grey levels; raises ImageError as `decode_picture` does."""
    header = read_header(data)
    if header.is_turbo:
        try:
            # libjpeg decodes straight to an eighth, a quarter or half of the size
            pixels_HW1 = simplejpeg.decode_jpeg(data, "GRAY", min_height=2 * SIDE, min_width=2 * SIDE, strict=False)
            small_SS1 = _resize(Image.fromarray(pixels_HW1[..., 0]))[..., None]
            return np.ascontiguousarray(upright(small_SS1, header.turn)[..., 0])
        except ValueError:
            pass
    return _resize(Image.fromarray(decode_picture(data)).convert("L"))


def _resize(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def hash_pictures(pictures: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint64]:
    """The hashes [N] of pictures that `shrink` gave."""
    if not pictures:
        return np.zeros(0, np.uint64)
    grey_NSS = np.stack(pictures).astype(np.float32)
    spectrum_NSS = _COSINES_SS @ grey_NSS @ _COSINES_SS.T
    bits_N64 = spectrum_NSS[:, _ROWS, _COLUMNS] > _NOISE
    return np.asarray(np.where(bits_N64, _WEIGHTS, np.uint64(0)).sum(axis=1), np.uint64)


def distances(first_N: npt.NDArray[np.uint64], second_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """In how many bits hashes differ, element by element."""
    bits_N: npt.NDArray[Any] = np.bitwise_xor(first_N, second_N)
    # sums of neighbouring bits, pairs, nibbles; then of all bytes by one multiplication
    bits_N = bits_N - ((bits_N >> np.uint64(1)) & np.uint64(0x5555555555555555))
    bits_N = (bits_N & np.uint64(0x3333333333333333)) + ((bits_N >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bits_N = (bits_N + (bits_N >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((bits_N * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)
