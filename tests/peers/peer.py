"""Runs in the other environment (tests/peers/setup.sh), as a subprocess: peer.py COMMAND ARGUMENT…

Files of tensors hold `images` (normalised pixels) and `tokens` on the way in, unit-length `image_features` and
`text_features`, and `logit_scale`, on the way out. Nothing of the project is imported here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torchvision_cpu  # noqa: F401
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

torch.set_num_threads(1)
torch.set_grad_enabled(False)


def merges() -> None:
    """Print the path of CLIP's byte-pair merges."""
    from open_clip.tokenizer import default_bpe

    print(default_bpe())


def open_clip_configs(names: str, output: str) -> None:
    """The configurations of models, defaults filled in, as JSON; `names` are separated by commas."""
    import open_clip
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    configs = {}
    for name in names.split(","):
        config = open_clip.get_model_config(name)
        towers = {"vision_cfg": CLIPVisionCfg(**config["vision_cfg"]), "text_cfg": CLIPTextCfg(**config["text_cfg"])}
        configs[name] = config | {tower: asdict(values) for tower, values in towers.items()}
    Path(output).write_text(json.dumps(configs))


def open_clip_tokens(captions: str, output: str, model: str) -> None:
    """Ids of a JSON list of captions, by the tokenizer that open_clip chooses for a model."""
    import open_clip

    save_file({"tokens": open_clip.get_tokenizer(model)(json.loads(Path(captions).read_text()))}, output)


def open_clip_features(name: str, folder: str, examples: str, output: str) -> None:
    """Features of an exported folder, loaded by the model's name and as a local directory; `name` may be empty."""
    import open_clip

    weights = str(Path(folder) / "open_clip_model.safetensors")
    local = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
    features = _open_clip_features(local, load_file(examples))
    if name:
        named = open_clip.create_model(name, pretrained=weights, require_pretrained=True)
        features |= {f"named_{key}": value for key, value in _open_clip_features(named, load_file(examples)).items()}
    save_file(features, output)


def open_clip_random(name: str, weights: str, examples: str, output: str) -> None:
    """Save the weights of a model with nothing at its default, and its features."""
    import open_clip

    torch.manual_seed(1)
    model = open_clip.create_model(name)
    _disturb(model.parameters())
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    save_file(_open_clip_features(model, load_file(examples)), output)


def open_clip_pixels(folder: str, image: str, output: str) -> None:
    """An image through the preprocessing that open_clip makes of an exported folder."""
    import open_clip
    from PIL import Image

    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    save_file({"pixels": preprocess(Image.open(image)).contiguous()}, output)


def transformers_features(folder: str, examples: str, output: str) -> None:
    """Features of an exported folder; fails if a weight is missing, left over or of another shape."""
    from transformers import CLIPModel

    model, report = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    wrong = {kind: names for kind, names in report.items() if names}
    assert not wrong, wrong
    tensors = load_file(examples)
    result = model.eval()(pixel_values=tensors["images"], input_ids=tensors["tokens"])
    features = {"image_features": result.image_embeds, "text_features": result.text_embeds}
    features = {name: normalize(value, dim=-1) for name, value in features.items()}
    save_file(features | {"logit_scale": model.logit_scale.data}, output)


def transformers_inputs(folder: str, captions: str, image: str, output: str) -> None:
    """Token ids and pixels by the processor of an exported folder."""
    from PIL import Image
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    texts = json.loads(Path(captions).read_text())
    inputs = processor(text=texts, images=Image.open(image), padding="max_length", truncation=True, return_tensors="pt")
    save_file({"tokens": inputs["input_ids"], "pixels": inputs["pixel_values"][0].contiguous()}, output)


def _open_clip_features(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.eval()
    images, texts = model.encode_image(tensors["images"]), model.encode_text(tensors["tokens"])
    features = {"image_features": normalize(images, dim=-1), "text_features": normalize(texts, dim=-1)}
    return features | {"logit_scale": model.logit_scale.data.clone()}


def _disturb(parameters: Iterable[torch.Tensor]) -> None:
    for parameter in parameters:
        parameter += 0.02 * torch.randn_like(parameter)


COMMANDS = {
    function.__name__: function
    for function in (
        merges,
        open_clip_configs,
        open_clip_tokens,
        open_clip_features,
        open_clip_random,
        open_clip_pixels,
        transformers_features,
        transformers_inputs,
    )
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
