"""Models that go to another library and come from it, and the features that both sides then give.

`Features` are unit-length `image_features`, `text_features`, and `logit_scale`, as files or in memory.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import torch
from peers.client import ROOT, Peer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from model.clip import CLIP
from model.config import CLIPConfig, config_from_name
from model.masking import MaskingConfig
from model.packing import normalize_pixels
from pipeline.data.captions import Tokenizer
from pipeline.data.image_transform import Preprocessing, decode_image, resize_center_crop
from pipeline.export import FORMATS, export, random_examples
from pipeline.inference import InferenceModel
from pipeline.ranks import Ranks
from pipeline.training.weights.start_weights import load_start_weights

Features = dict[str, Tensor]

DATA = Path(os.environ.get("CLUSTER_CLIP_DATA", ROOT.parent / "shared" / "data"))
PECULIAR_CAPTIONS = [
    "a dog",
    "Two CATS, one sofa; three o'clock!",
    "the photographer's wife doesn't know we've 12,345 of them (50% off) #sale @home",
    "",
    "a naïve café in Zürich — Ελλάδα, Россия, 日本の猫 한국어 العربية",
    "smile 😀👍🏽 👩‍👩‍👧 🇫🇷",
    "fish &amp; chips &amp;amp; &lt;b&gt;peas&lt;/b&gt; &quot;now&quot; it&#39;s",
    "“curly” ‘quotes’ and the dog’s bone…",
    "cafe\u0301 decomposed, tabs\tand\nlines \u00a0 spaces",
    "a_b-c/d\\e|f~g`h^i=j+k*l",
    "word " * 100,
]
_ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@dataclass(frozen=True)
class Case:
    """A model and the library it goes to and comes from; `known` where that has a model of the same name."""

    config: CLIPConfig
    library: str
    known: bool = False

    @property
    def label(self) -> str:
        """Unique among the cases."""
        return f"{self.config.name}/{self.library}"


def small_config(**variant: str) -> CLIPConfig:
    """A model that no library knows by name: patch 14, other image, head and context sizes, and a variant."""
    config = config_from_name("ViT-nano-8")
    vision = replace(config.vision, image_size=84, patch_size=14, pool=variant.get("pool", "class"))
    name = "-".join(["ViT-nano-14", *variant.values()])
    text = replace(config.text, context_length=40)
    return replace(config, name=name, vision=vision, text=text).with_activation(variant.get("activation", "gelu"))


CASES = [
    *(Case(config_from_name(name), "open_clip", True) for name in ("ViT-S-32", "ViT-S-16", "ViT-B-32", "ViT-B-16")),
    Case(small_config(), "open_clip"),
    Case(small_config(activation="quick_gelu"), "open_clip"),
    Case(small_config(pool="average"), "open_clip"),
    Case(replace(small_config(), name="ViT-nano-14-sigmoid", init_logit_bias=-9.0), "open_clip"),
    Case(config_from_name("ViT-B-32"), "transformers"),
    Case(small_config(), "transformers"),
    Case(small_config(activation="quick_gelu"), "transformers"),
]


def both_ways(case: Case, folder: Path, tokenizer: Tokenizer, peer: Peer) -> dict[str, tuple[Features, Features]]:
    """Their features and ours: of a model of theirs that was loaded here, then of the same exported to them."""
    config, export_format = case.config, FORMATS[case.library]
    tokenizer = Tokenizer(tokenizer.encoder, tokenizer.source, config.text.context_length)
    examples = write_examples(folder / "examples", config, tokenizer)
    model = untrained_model(config, tokenizer)
    source = folder / "source"
    source.mkdir()
    if not case.known:
        for name, content in export_format.text_files(model.clip.config, tokenizer.encoder).items():
            (source / name).write_text(content, encoding="utf-8")
    name = [config.name if case.known else ""] if case.library == "open_clip" else []
    peer(f"{case.library}_random", *name, source, folder / "examples", folder / "theirs")
    load_start_weights(
        model.clip, str(source / export_format.weights_file if case.known else source), tokenizer, _ALONE
    )
    ours = features(model.clip, examples)
    export(model, export_format, folder / "export", random_examples(model, count=1))
    peer(f"{case.library}_features", *name, folder / "export", folder / "examples", folder / "again")
    return {
        f"from_{case.library}": (load_file(folder / "theirs"), ours),
        f"to_{case.library}": (load_file(folder / "again"), ours),
    }


def differences(theirs: Features, ours: Features) -> dict[str, float]:
    """Largest absolute difference of the features of each tower."""
    names = {"image": "image_features", "text": "text_features"}
    return {tower: (theirs[name] - ours[name]).abs().max().item() for tower, name in names.items()}


def untrained_model(config: CLIPConfig, tokenizer: Tokenizer) -> InferenceModel:
    """A model as it comes, with what an export wants to know of its run."""
    torch.manual_seed(0)
    clip = CLIP(config).eval()
    return InferenceModel(
        clip,
        tokenizer,
        Preprocessing(config.vision.image_size),
        config.name,
        "runs/test",
        7,
        112,
        "0" * 64,
        MaskingConfig(),
    )


def write_examples(path: Path, config: CLIPConfig, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Pixels and token ids, padded to the context length with end tokens, as a file for the peer."""
    jpegs, captions = real_pairs() or made_pairs()
    images = [resize_center_crop(decode_image(jpeg), config.vision.image_size) for jpeg in jpegs]
    ids_BT = torch.full((len(captions), tokenizer.context_length), config.text.eot_token_id)
    for row_T, caption in zip(ids_BT, captions, strict=True):
        ids = tokenizer.encode(caption)
        row_T[: len(ids)] = torch.tensor(ids)
    tensors = {"images": normalize_pixels(torch.stack(images)), "tokens": ids_BT}
    save_file(tensors, path)
    return tensors


def real_pairs(count: int = 6) -> tuple[list[bytes], list[str]] | None:
    """Pictures and captions of Flickr8k, where they are; peculiar captions as well."""
    path = DATA / "flickr8k_val.parquet"
    if not path.exists():
        return None
    rows = next(pq.ParquetFile(path).iter_batches(batch_size=count)).to_pylist()
    return [row["image"] for row in rows], [row["captions"][0] for row in rows] + PECULIAR_CAPTIONS


def made_pairs(count: int = 3) -> tuple[list[bytes], list[str]]:
    """Pictures of coarse noise, and peculiar captions."""
    jpegs = []
    for seed in range(count):
        coarse = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8, generator=Generator().manual_seed(seed))
        stream = io.BytesIO()
        Image.fromarray(coarse.numpy()).resize((320, 240)).save(stream, "JPEG", quality=90)
        jpegs.append(stream.getvalue())
    return jpegs, PECULIAR_CAPTIONS


@torch.inference_mode()
def features(clip: CLIP, examples: dict[str, Tensor]) -> Features:
    """Ours."""
    return {
        "image_features": clip.encode_image(examples["images"]),
        "text_features": clip.encode_text(examples["tokens"]),
        "logit_scale": clip.logit_scale.reshape(()),
    }
