"""Reading native MiniMind-V weights: `.pth` files, resume checkpoints and native folders. Nothing in them is executed."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .report import ConversionError, explained


class NativeWeights(NamedTuple):
    """What a native file holds: tensors on the CPU, a folder's config.json, and what else a resume checkpoint has, by name."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    other_entries: list[str]


def read_native_weights(path: Path) -> NativeWeights:
    """Read a `.pth` file, a resume checkpoint, or a folder with pytorch_model.bin and config.json.

    Raises ConversionError where there is none, it is damaged or of another kind, or wants to execute code.
    """
    config: dict[str, Any] = {}
    file = path
    if path.is_dir():
        file = path / "pytorch_model.bin"
        with explained(f"{path} is no native folder, with a pytorch_model.bin and a config.json of MiniMind"):
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            if config["model_type"] not in ("minimind", "minimind-v"):
                raise ValueError(f"model_type is {config['model_type']!r}")
    if not file.is_file():
        raise ConversionError(f"there is no file {file}")
    content, other_entries = _load(file), []
    if isinstance(content, dict) and isinstance(content.get("model"), dict):  # a resume checkpoint
        other_entries = sorted(str(name) for name in content if name != "model")
        content = content["model"]
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds a {type(content).__name__}, where a state dict was expected")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"{file} is no state dict: its entry {name!r} is a {type(tensor).__name__}, not a tensor")
    return NativeWeights(content, config, other_entries)


def _load(file: Path) -> Any:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():  # torch itself does not check the checksums
                    raise zipfile.BadZipFile(damaged)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes its readers raise
        if called := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"wants to call {called[1]}, but weights need no code of their own: nothing of it was executed"
        else:
            reason = "is no PyTorch checkpoint (but safetensors or a Git LFS pointer, say), or truncated or damaged"
        raise ConversionError(f"{file} {reason}") from None
