"""Features are the model's own, whatever they are encoded with, and are stored whole or not at all."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_material import CPU, encode, encoder_of, letter_model, retrieval_set, write_noise
from PIL import Image
from safetensors.torch import save_file

from formats.errors import UserError
from formats.files import write_atomically
from model.clip import CLIP
from model.masking import MaskingConfig
from model.packing import normalize_pixels
from pipeline.data.image_transform import decode_image, resize_center_crop
from pipeline.evaluation.features import FeatureStore
from pipeline.evaluation.jobs import Slice, encode_slice, job_files, make_job
from pipeline.evaluation.sets.files import Collection, ImageFile
from pipeline.evaluation.sets.layouts import open_evaluation_set
from pipeline.evaluation.tasks.task import distinct
from pipeline.inference import InferenceModel
from pipeline.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    return letter_model()


@pytest.fixture
def images(tmp_path: Path) -> list[ImageFile]:
    return write_noise(tmp_path)


def test_image_features_are_the_models_own_in_order(model: InferenceModel, images: list[ImageFile]) -> None:
    pixels_BCHW = torch.stack([resize_center_crop(decode_image(image.path.read_bytes()), 32) for image in images])
    with torch.no_grad():
        expected_ND = model.clip.encode_image(normalize_pixels(pixels_BCHW))
    torch.testing.assert_close(encode(encoder_of(model), images), expected_ND)


def test_masked_features_depend_on_the_image_alone(model: InferenceModel, images: list[ImageFile]) -> None:
    masking = MaskingConfig(strategy="cluster", target_mask_ratio=0.5)
    masking_encoder = replace(encoder_of(model), masking=masking)
    masked = encode(masking_encoder, images)
    in_other_batches = encode(masking_encoder, images[::-1], batch_size=8)
    torch.testing.assert_close(masked, in_other_batches.flip(0))
    assert masked.norm(dim=1) == pytest.approx(torch.ones(8))
    whole = encode(encoder_of(model), images)
    assert (masked - whole).abs().max() > 1e-3
    nothing_hidden = encode(replace(encoder_of(model), masking=MaskingConfig(strategy="none")), images)
    torch.testing.assert_close(nothing_hidden, whole)


def test_text_features_do_not_depend_on_the_batch(model: InferenceModel) -> None:
    texts = ["a", "a red square", "three discs left of a cross", "b", "a red square"]
    one_by_one = encode(encoder_of(model), texts, batch_size=1)
    torch.testing.assert_close(encode(encoder_of(model), texts, batch_size=4), one_by_one)
    assert one_by_one.norm(dim=1) == pytest.approx(torch.ones(5))


def test_distinct_is_undone_by_its_index() -> None:
    items, index_N = distinct(["b", "a", "b", "c", "a"])
    assert items == ["b", "a", "c"]
    assert [items[index] for index in index_N] == ["b", "a", "b", "c", "a"]


def test_an_image_that_does_not_decode_stops_the_evaluation(model: InferenceModel, images: list[ImageFile]) -> None:
    images[5].path.write_bytes(b"\xff\xd8\xff\xe0 not a jpeg" + bytes(40))
    with pytest.raises(UserError, match=r"5\.png does not decode"):
        encode(encoder_of(model), [*images[:5], ImageFile.whole(images[5].path)])


def test_features_that_are_not_finite_stop_the_evaluation(model: InferenceModel, images: list[ImageFile]) -> None:
    broken = CLIP(model.clip.config)
    with torch.no_grad():
        broken.visual.proj.fill_(torch.nan)
    with pytest.raises(UserError, match=r"step_7 gives features that are not finite for 8 of 8 images"):
        encode(encoder_of(replace(model, clip=broken)), images)


def test_a_rank_stops_when_another_fails(tmp_path: Path, model: InferenceModel, images: list[ImageFile]) -> None:
    class FailingElsewhere(Ranks):
        def any(self, flag: bool) -> bool:
            return True

    data = retrieval_set(tmp_path / "pictures", images)
    job = make_job(model.identity, data, open_evaluation_set(data), None, batch_size=2, masking=None)
    encoder = replace(encoder_of(model), ranks=FailingElsewhere(0, 0, 1, CPU))
    with pytest.raises(UserError, match="another rank"):
        encode_slice(job, encoder, Slice(), tmp_path / "out")
    assert not job_files(tmp_path / "out")


def test_pieces_that_overlap_are_no_number(tmp_path: Path, model: InferenceModel, images: list[ImageFile]) -> None:
    store = FeatureStore(tmp_path, Collection("some", "images", images), {"name": "m"}, 2)
    encoder_of(model).encode(store, range(store.num_batches))
    (piece,) = store.pieces()
    store.write(1, torch.zeros(4, 64), [b"\0" * 32] * 4)
    with pytest.raises(UserError, match="there twice"):
        store.load()
    (store.directory / "000000002-000000006.safetensors").unlink()
    whole = piece.path.read_bytes()
    store.write(0, torch.full((8, 64), torch.nan), [b"\0" * 32] * 8)
    with pytest.raises(UserError, match=r"000000000-000000008\.safetensors holds features that are not finite"):
        store.load(is_checked=True)
    piece.path.write_bytes(whole)
    piece.path.write_bytes(piece.path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        store.load()


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """As ranks that begin a store at the same moment."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_atomically(tmp_path / "file", str(n % 3)), range(200)))
    assert (tmp_path / "file").read_text() in "012"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_features_of_the_first_version_are_found_and_taken_where_they_saw_the_same_pixels(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile]
) -> None:
    """Its pieces say nothing of the decoder, which neither turned pictures nor scaled 16 bits."""
    for collection, identity, name in (
        (
            Collection("a set", "texts", ["a cat", "ein Käfer"]),
            {"name": "m", "weights_sha256": "ab"},
            "a_set-d476967a5564c902",
        ),
        (
            Collection("a set", "images", [ImageFile(Path("x/0.tar"), "a.jpg", 512, 99)]),
            {"image_size": 32},
            "a_set-9fc23b84fb727976",
        ),
    ):
        assert FeatureStore(tmp_path, collection, identity, 3).directory.name == name

    sixteen_bits = tmp_path / "deep.png"
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16).save(sixteen_bits)
    store = FeatureStore(tmp_path, Collection("some", "images", [*images[:3], ImageFile.whole(sixteen_bits)]), {}, 2)
    store.directory.mkdir(parents=True)
    for first in (0, 2):
        digests = [hashlib.sha256(item.read()).digest() for item in store.collection.items[first : first + 2]]
        digests_232 = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(2, 32)
        features_2D = torch.zeros(2, model.clip.config.embed_dim)
        file = store.directory / f"{first:09d}-{first + 2:09d}.safetensors"
        save_file({"features": features_2D, "sha256": digests_232}, file)
    assert encoder_of(model).encode(store, range(2)) == 2
    features_ND, _ = store.load()
    assert (features_ND.norm(dim=1) > 0.5).tolist() == [False, False, True, True]
