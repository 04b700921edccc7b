"""One model's weights in the forms that others save them in: each a folder or a file to load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]


def prefixed(weights: Mapping[str, Tensor], prefix: str) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def compiled_blocks(weights: Mapping[str, Tensor]) -> Weights:
    """As torch.compile of each block and activation checkpointing of the towers name them."""
    inside = {name: name.replace("resblocks.", "resblocks._checkpoint_wrapped_module.") for name in weights}
    return {inside[name].replace(".attn.", "._orig_mod.attn."): value for name, value in weights.items()}


def numbers(kind: Callable[[int], object]) -> dict[str, object]:
    """What OpenAI's files hold beside the weights."""
    return {"input_resolution": kind(32), "context_length": kind(77), "vocab_size": kind(49_408)}


def scripted(weights: Mapping[str, Tensor]) -> torch.jit.ScriptModule:
    """An archive of torch.jit with these weights, OpenAI's numbers, and code that nobody may run."""
    root = nn.Module()
    for name, value in weights.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(value, requires_grad=False))
    for name, number in numbers(int).items():
        setattr(root, name, number)
    return torch.jit.script(root)


OPEN_CLIP_FILES: dict[str, Callable[[Weights], object]] = {
    "ddp": lambda weights: prefixed(weights, "module."),
    "ddp of compiled": lambda weights: prefixed(weights, "module._orig_mod."),
    "compiled": lambda weights: prefixed(weights, "_orig_mod."),
    "compiled blocks": compiled_blocks,
    "state_dict": lambda weights: {"epoch": 3, "state_dict": prefixed(weights, "module."), "optimizer": {"state": {}}},
    "wrapped twice": lambda weights: {"step": 5, "model": {"state_dict": weights}},
    "openai, numbers": lambda weights: weights | numbers(int),
    "openai, tensors": lambda weights: weights | numbers(torch.tensor),
    "scripted": scripted,
    "with buffers": lambda weights: weights | {"attn_mask": torch.zeros(77, 77)},
    "text under its name": lambda weights: {
        name if name.startswith(("visual.", "logit_")) else f"text.{name}": value for name, value in weights.items()
    },
}


def write_open_clip(form: str, export: Path, folder: Path) -> Path:
    """A file of the form with open_clip's configuration beside it."""
    folder.mkdir()
    for file in export.glob("*.json"):
        shutil.copy(file, folder)
    content = OPEN_CLIP_FILES[form](load_file(export / "open_clip_model.safetensors"))
    path = folder / "weights.pt"
    if isinstance(content, torch.jit.ScriptModule):
        content.save(str(path))
    else:
        torch.save(content, path)
    return path


def write_parts(folder: Path, name: str, save: Callable[[Weights, Path], object]) -> None:
    """`model.safetensors` of a transformers folder in its place as two parts and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = name.split(".")
    names = sorted(weights)
    index = {}
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{part}-of-00002.{suffix}"
        save({key: weights[key].contiguous() for key in chosen}, folder / file)
        index |= dict.fromkeys(chosen, file)
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / f"{name}.index.json").write_text(json.dumps(content))


def as_one_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_defaults(folder: Path) -> None:
    """A configuration as short as transformers reads it."""
    content = json.loads((folder / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        for name in ("layer_norm_eps", "projection_dim", "model_type", "max_position_embeddings"):
            content[tower].pop(name, None)
    content["text_config"]["eos_token_id"] = [content["text_config"]["eos_token_id"]]
    (folder / "config.json").write_text(json.dumps(content))


def old_sections(folder: Path) -> None:
    """`text_config_dict` as transformers 4 wrote it, beside a section that it replaces."""
    content = json.loads((folder / "config.json").read_text())
    content["text_config_dict"] = content["text_config"] | {"eos_token_id": 2}
    content["text_config"] = {"hidden_size": 7}
    (folder / "config.json").write_text(json.dumps(content))


def tokenizer_in_one(folder: Path) -> None:
    """`tokenizer.json` alone, as transformers 5 saves it."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    start, end = "<|startoftext|>", "<|endoftext|>"
    content = {
        "added_tokens": [{"id": ids.pop(token), "content": token} for token in (start, end)],
        "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": ids, "merges": [x.split() for x in lines]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "merges.txt").unlink()
    (folder / "vocab.json").unlink()


TRANSFORMERS_FOLDERS: dict[str, Callable[[Path], object]] = {
    "pytorch_model.bin": as_one_bin,
    "safetensors in parts": lambda folder: write_parts(folder, "model.safetensors", save_file),
    "bin in parts": lambda folder: write_parts(folder, "pytorch_model.bin", torch.save),
    "without defaults": without_defaults,
    "old sections": old_sections,
    "tokenizer.json alone": tokenizer_in_one,
}


def write_transformers(form: str, export: Path, folder: Path) -> Path:
    """A folder of the form."""
    shutil.copytree(export, folder)
    TRANSFORMERS_FOLDERS[form](folder)
    return folder
