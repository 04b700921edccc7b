"""Files of weights as they come: safetensors, torch's files, parts with an index, scripted archives.

Nothing is executed: torch's files are read with `weights_only`, and of a scripted archive (OpenAI's files) the tensors
alone, its objects as nodes that do nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from formats.errors import UserError
from formats.files import sha256_of

# Under which training scripts keep the weights beside the optimizer's state.
_WEIGHTS_KEYS = ("state_dict", "model_state_dict", "model", "module")
# What DDP, torch.compile, FSDP and activation checkpointing put into the names of what they wrap.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Numbers that OpenAI's files hold beside the weights, whose shapes say the same.
OPENAI_NUMBERS = frozenset({"input_resolution", "context_length", "vocab_size"})
_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def find_parts(folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """The first of the named files that a folder has, or the parts that its index (`NAME.index.json`) lists; or ().

    Raises UserError if a part is missing, or the index is none.
    """
    for name in names:
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _parts_of(index)
    return ()


def _parts_of(index: Path) -> tuple[Path, ...]:
    try:
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not parts or any(Path(part).name != part for part in parts):
            raise ValueError("weight_map does not name files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weights: {error!r}") from error
    for part in parts:
        if not (index.parent / part).is_file():
            raise UserError(f"{index.parent / part} is missing, which {index.name} names: copy all parts of the model")
    return tuple(index.parent / part for part in parts)


def sha256_of_parts(parts: Sequence[Path]) -> str:
    """The hash of a file, or of the hashes of several."""
    hashes = [sha256_of(part) for part in parts]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_parts(parts: Sequence[Path]) -> tuple[dict[str, Tensor], bool]:
    """Tensors by their names without wrappers', and whether OpenAI's numbers were among them.

    Raises UserError for a file that cannot be read or holds something else than one model's weights.
    """
    values: dict[str, Any] = {}
    for part in parts:
        for wrapped, value in _weights_in(_read(part), part).items():
            name = _unwrapped(str(wrapped))
            if name in values:
                raise UserError(
                    f"{part} holds more than the weights of one model: {name} comes twice, as {wrapped} too"
                )
            values[name] = value
    is_openai = OPENAI_NUMBERS <= values.keys()
    weights = {name: value for name, value in values.items() if name not in OPENAI_NUMBERS}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{parts[0]} holds something else than the weights of one model: {name} is {type(value).__name__}"
            )
        if value.layout != torch.strided or value.is_meta:
            kind = "is on the meta device, without values" if value.is_meta else f"has the layout {value.layout}"
            raise UserError(f"{parts[0]}: {name} {kind}: save the model's weights as plain tensors")
    return weights, is_openai


def _unwrapped(name: str) -> str:
    return ".".join(component for component in name.split(".") if component not in _WRAPPERS)


def _weights_in(content: object, path: Path) -> Mapping[Any, Any]:
    """The state dict itself, or the one that a training checkpoint holds."""
    while isinstance(content, Mapping):
        nested = [content[key] for key in _WEIGHTS_KEYS if isinstance(content.get(key), Mapping)]
        if not nested:
            break
        content = nested[0]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds something else than the weights of one model")
    return content


def _read(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_scripted(path):
            return _read_scripted(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # readers of torch and pickle raise whatever they like
        other = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path} is not a plain file of tensors{f': it holds {other[1]}' if other else ''}; nothing else is "
            "unpickled: where you trust it, save its state_dict() alone, as safetensors"
        ) from error


def _is_scripted(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_scripted(path: Path) -> dict[str, Any]:
    """The state dict of an archive of `torch.jit.save`, from its data alone; its code is not looked at."""
    with zipfile.ZipFile(path) as archive:
        (data,) = (name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
        with archive.open(data) as file:
            model = _ScriptedUnpickler(file, archive, data.removesuffix("data.pkl")).load()
    return dict(_members(model, ""))


class _Node:
    """An object of a scripted archive: its members, and nothing that acts."""

    members: Mapping[str, Any] = {}

    def __new__(cls, *_: object) -> _Node:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.members = state if isinstance(state, Mapping) else {}


class _ScriptedUnpickler(pickle.Unpickler):
    """Makes tensors and `_Node`s; no other class or function can be reached."""

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(file)
        self._archive = archive
        self._prefix = prefix

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the archive stands for."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return _DTYPES[name] if module == "torch" and name in _DTYPES else _Node

    def persistent_load(self, pid: Any) -> Tensor:
        """All values of one storage: pid is ("storage", dtype, file, device, number of values)."""
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a storage of unknown type")
        values = self._archive.read(f"{self._prefix}data/{key}")
        return torch.frombuffer(bytearray(values), dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Tensor:
    if not math.prod(size):
        return storage.new_empty(tuple(size))
    return storage.as_strided(tuple(size), tuple(stride), offset).clone()


def _members(node: object, prefix: str) -> list[tuple[str, Any]]:
    """Tensors of a node and of the nodes in it, by their names; OpenAI's numbers, which it may have as plain ones."""
    found: list[tuple[str, Any]] = []
    for name, value in node.members.items() if isinstance(node, _Node) else ():
        if isinstance(value, Tensor) or (name in OPENAI_NUMBERS and not prefix):
            found.append((prefix + name, value))
        else:
            found += _members(value, f"{prefix}{name}.")
    return found
