"""Images as grids of patches: cutting, normalising, gathering.

B images, L patches, P values of a patch, K kept
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mask_pictures import generator, photos_BCHW, pictures_BCHW

from model.masking import PatchedImages, patchify
from model.packing import PIXEL_MEAN, PIXEL_STD, normalize_pixels


def test_patchify_cuts_rows_and_columns() -> None:
    image = torch.arange(3 * 8 * 12).view(1, 3, 8, 12)
    patches = patchify(image, 4)
    assert patches.shape == (1, 6, 48)
    for row in range(2):
        for column in range(3):
            expected = image[0, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].flatten()
            assert torch.equal(patches[0, row * 3 + column], expected)
    with pytest.raises(ValueError, match="cannot be cut"):
        patchify(image, 5)


def test_normalised_pixels_equal_the_formula() -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=generator())
    before = pixels.clone()
    mean, std = (np.array(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    expected = torch.tensor((pixels.numpy() / 255.0 - mean) / std)
    for images, formula in ((pixels, expected), (pixels[0], expected[0])):
        normalised = normalize_pixels(images)
        assert normalised.dtype == torch.float32
        assert torch.allclose(normalised.double(), formula, atol=1e-6)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("patch_size", [14, 16, 32])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
def test_gathering_equals_cutting_all_to_the_bit(patch_size: int, dtype: torch.dtype) -> None:
    size = 3 * patch_size
    images = photos_BCHW(4, size) if dtype == torch.uint8 else pictures_BCHW(4, size).to(dtype)
    kept = torch.randperm(4 * 9, generator=generator())[:17]
    normalised = normalize_pixels(images) if dtype == torch.uint8 else images
    expected = patchify(normalised, patch_size).flatten(0, 1)[kept]
    patched = PatchedImages(images, patch_size)
    assert torch.equal(patched.gather(kept), expected)
    assert torch.equal(patched.patches().flatten(0, 1)[kept], expected)
    assert torch.equal(patched.patches(slice(1, 3)), patchify(normalised[1:3], patch_size))
    assert (patched.num_images, patched.grid, patched.num_patches) == (4, (3, 3), 9)


def test_the_grid_of_an_image_that_is_not_square() -> None:
    patched = PatchedImages(pictures_BCHW(2, 16, width=40), 8)
    assert (patched.grid, patched.num_patches) == ((2, 5), 10)
