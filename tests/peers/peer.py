"""Runs in the other environment (tests/peers/setup.sh), as a subprocess; peers/client.py talks to it.

A line on stdin is a JSON list, a command and its arguments; the answer is one JSON line, {"result"} or {"error"}: the
libraries take longer to import than most commands.

Files of tensors hold `images` (normalised pixels) and `tokens` on the way in, unit-length `image_features` and
`text_features`, and `logit_scale`, on the way out. Nothing of the project is imported here.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torchvision_cpu  # noqa: F401
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

torch.set_num_threads(1)
torch.set_grad_enabled(False)


def merges() -> str:
    """The path of CLIP's byte-pair merges."""
    from open_clip.tokenizer import default_bpe

    return str(default_bpe())


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
    """Features of an exported folder: its weights loaded by the model's name, or, without a name, the whole folder."""
    import open_clip

    weights = str(Path(folder) / "open_clip_model.safetensors")
    if name:
        model = open_clip.create_model(name, pretrained=weights, require_pretrained=True)
    else:
        model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
    save_file(_open_clip_features(model, load_file(examples)), output)


def open_clip_random(name: str, folder: str, examples: str, output: str) -> None:
    """Save into a folder the weights of a model with nothing at its default, and its features as a file.

    Without a name the folder already holds the model's configuration, open_clip_config.json.
    """
    import open_clip

    torch.manual_seed(1)
    if name:
        model = open_clip.create_model(name)
    else:
        model = open_clip.CLIP(**json.loads((Path(folder) / "open_clip_config.json").read_text())["model_cfg"])
    _disturb(model.parameters())
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, Path(folder) / "open_clip_model.safetensors")
    save_file(_open_clip_features(model, load_file(examples)), output)


def open_clip_resized(positions: str, grid_size: str, output: str) -> None:
    """Positions of an image tower on another grid, as open_clip resizes them when it loads weights."""
    from open_clip.model import resize_pos_embed

    weights = load_file(positions)
    resize_pos_embed(weights, SimpleNamespace(visual=SimpleNamespace(grid_size=int(grid_size))))
    save_file(weights, output)


def open_clip_pixels(folder: str, image: str, output: str) -> None:
    """An image through the preprocessing that open_clip makes of an exported folder."""
    import open_clip
    from PIL import Image

    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    save_file({"pixels": preprocess(Image.open(image)).contiguous()}, output)


def open_clip_preprocessed(settings: str, images: str, output: str) -> None:
    """Images [N] of a folder, by name, through the transform of each of a JSON list of settings: `0`, `1`, …"""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transforms = [image_transform_v2(PreprocessCfg(**fields), is_train=False) for fields in json.loads(settings)]
    save_file({str(i): _stacked(images, transform) for i, transform in enumerate(transforms)}, output)


def transformers_preprocessed(settings: str, images: str, output: str) -> None:
    """The same through transformers' processor on Pillow, which reads each of the settings from a file."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tensors = {}
    for i, fields in enumerate(json.loads(settings)):
        file = Path(output).with_suffix(".json")
        file.write_text(json.dumps(fields))
        processor = CLIPImageProcessorPil.from_pretrained(str(file))

        def transform(image: object, processor: CLIPImageProcessorPil = processor) -> torch.Tensor:
            return processor(image, return_tensors="pt")["pixel_values"][0]

        tensors[str(i)] = _stacked(images, transform)
    save_file(tensors, output)


def _stacked(images: str, transform: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    from PIL import Image

    return torch.stack([transform(Image.open(path)) for path in sorted(Path(images).iterdir())])


def open_clip_scripted(folder: str, output: str) -> None:
    """An exported folder's model as the archive of code and weights that OpenAI publishes, with its three numbers."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    model.input_resolution = model.visual.image_size[0]
    assert isinstance(model.context_length, int)
    assert isinstance(model.vocab_size, int)
    torch.jit.script(model).save(output)


def transformers_resaved(folder: str, output: str) -> None:
    """Load an exported folder and save it as this version does, in parts, its configuration without defaults."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder, local_files_only=True)
    model.save_pretrained(output, max_shard_size="100KB")
    CLIPProcessor.from_pretrained(folder, local_files_only=True).save_pretrained(output)
    content, defaults = model.config.to_dict(), CLIPConfig().to_dict()
    for tower in ("vision_config", "text_config"):
        content[tower] = {name: value for name, value in content[tower].items() if value != defaults[tower].get(name)}
    (Path(output) / "config.json").write_text(json.dumps(content))


def transformers_features(folder: str, examples: str, output: str) -> None:
    """Features of an exported folder; fails if a weight is missing, left over or of another shape."""
    from transformers import CLIPModel

    model, report = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    wrong = {kind: names for kind, names in report.items() if names}
    assert not wrong, wrong
    save_file(_transformers_features(model, load_file(examples)), output)


def transformers_random(folder: str, examples: str, output: str) -> None:
    """Save into a folder that holds the configuration a model with nothing at its default, and its features."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig.from_pretrained(folder))
    _disturb(model.parameters())
    model.save_pretrained(folder)
    save_file(_transformers_features(model, load_file(examples)), output)


def dinov2_random(folder: str, images: str, output: str) -> None:
    """Save a DINOv2 with nothing at its default, and what its class token becomes of images of another size."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(2)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=70, patch_size=14, layer_norm_eps=1e-5
    )
    model = Dinov2Model(config).eval()
    _disturb(model.parameters())
    model.save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 42, "width": 42}).save_pretrained(folder)
    pixels = load_file(images)["images"]
    save_file({"image_features": model(pixel_values=pixels).last_hidden_state[:, 0].contiguous()}, output)


def transformers_inputs(folder: str, captions: str, image: str, output: str) -> None:
    """Token ids and pixels by the processor of an exported folder."""
    from PIL import Image
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    texts = json.loads(Path(captions).read_text())
    inputs = processor(text=texts, images=Image.open(image), padding="max_length", truncation=True, return_tensors="pt")
    save_file({"tokens": inputs["input_ids"], "pixels": inputs["pixel_values"][0].contiguous()}, output)


def clip_benchmark(folder: str, data: str, task: str, output: str, dataset: str = "wds/set") -> None:
    """`clip_benchmark eval` of an exported folder on a webdataset, or another of its data sets, fp32; its JSON file."""
    from unittest.mock import patch

    from clip_benchmark import cli
    from clip_benchmark.metrics import zeroshot_classification

    # its own converts arrays of one element to numbers, which numpy 2.4 and later refuse
    zeroshot_classification.accuracy = _topk_accuracy
    arguments = ["eval", "--model", f"local-dir:{folder}", "--pretrained", "", "--task", task, "--no_amp", "--quiet"]
    arguments += ["--dataset", dataset, "--dataset_root", data, "--output", output]
    arguments += ["--num_workers", "0", "--recall_k", "1", "5", "10"]
    with patch.object(sys, "argv", ["clip_benchmark", *arguments]):
        cli.main()


def logistic_regression(splits: str, decay: str, output: str) -> None:
    """scikit-learn's logits [N, C] of `test` by a fit to `train` and `labels`, with our weight decay."""
    from sklearn.linear_model import LogisticRegression

    tensors = load_file(splits)
    penalty = 1 / (len(tensors["train"]) * float(decay))  # theirs is the sum of losses, ours their mean
    probe = LogisticRegression(C=penalty, max_iter=10_000, tol=1e-7)
    probe.fit(tensors["train"].double().numpy(), tensors["labels"].numpy())
    save_file({"logits": torch.from_numpy(probe.decision_function(tensors["test"].double().numpy()))}, output)


def clip_benchmark_probe(splits: str, output: str) -> None:
    """The same by CLIP_benchmark's training of a probe, at its defaults; it asks for CUDA and is given the CPU."""
    from unittest.mock import patch

    from clip_benchmark.metrics import linear_probe

    tensors = load_file(splits)
    features = linear_probe.FeatureDataset(tensors["train"], tensors["labels"])
    batches = torch.utils.data.DataLoader(features, batch_size=64, shuffle=True)
    shape = (tensors["train"].shape[1], int(tensors["labels"].max()) + 1)
    with (
        patch.object(torch.nn.Module, "cuda", lambda module: module),
        patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
        patch.object(torch.nn, "DataParallel", lambda module, device_ids: module),
        torch.enable_grad(),
    ):
        probe = linear_probe.train(batches, *shape, 0.0, 0.1, 10, False, "cpu", 0)
    save_file({"logits": probe(tensors["test"])}, output)


def _topk_accuracy(logits: torch.Tensor, target: torch.Tensor, topk: tuple[int, ...]) -> list[float]:
    correct = logits.topk(max(topk), 1, True, True)[1].t().eq(target.view(1, -1))
    return [float(correct[:k].reshape(-1).float().sum()) / len(target) for k in topk]


def clip_benchmark_table(files: str, output: str) -> None:
    """`clip_benchmark build` of a folder of JSON files."""
    from unittest.mock import patch

    from clip_benchmark import cli

    with patch.object(sys, "argv", ["clip_benchmark", "build", files, "--output", output]):
        cli.main()


def _open_clip_features(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.eval()
    images, texts = model.encode_image(tensors["images"]), model.encode_text(tensors["tokens"])
    features = {"image_features": normalize(images, dim=-1), "text_features": normalize(texts, dim=-1)}
    return features | {"logit_scale": model.logit_scale.data.clone()}


def _transformers_features(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = model.eval()(pixel_values=tensors["images"], input_ids=tensors["tokens"])
    features = {"image_features": result.image_embeds, "text_features": result.text_embeds}
    features = {name: normalize(value, dim=-1) for name, value in features.items()}
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
        open_clip_resized,
        open_clip_pixels,
        open_clip_preprocessed,
        open_clip_scripted,
        transformers_features,
        transformers_random,
        dinov2_random,
        transformers_inputs,
        transformers_preprocessed,
        transformers_resaved,
        clip_benchmark,
        logistic_regression,
        clip_benchmark_probe,
        clip_benchmark_table,
    )
}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Run one command per line until there are no more."""
    for line in requests:
        command, *arguments = json.loads(line)
        try:
            answer = {"result": COMMANDS[command](*arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the libraries print is no answer
    serve(sys.stdin, answers)
