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
    config, file = {}, path
    if path.is_dir():
        config, file = _read_native_config(path), path / "pytorch_model.bin"
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


def _read_native_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ConversionError(f"{folder} is no native folder: it has no config.json (pass a .pth file by its full name)")
    with explained(f"{file} holds no configuration"):
        config = json.loads(file.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    if model_type not in ("minimind", "minimind-v"):
        raise ConversionError(f"{file} has model_type {model_type!r}, where 'minimind' or 'minimind-v' was expected")
    return config


def _load(file: Path) -> Any:
    with file.open("rb") as stream:
        head = stream.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{file} is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`")
    if head[8:9] == b"{":
        raise ConversionError(f"{file} is a safetensors file, where a native .pth file was expected")
    try:
        if head.startswith(b"PK"):
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():  # torch itself does not check the checksums
                    raise zipfile.BadZipFile(damaged)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes its readers raise
        called = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = "is not a PyTorch checkpoint, or is truncated or damaged: fetch it again"
        if called:
            reason = f"wants to call {called[1]}, but weights need no code of their own: nothing of it was executed"
        raise ConversionError(f"{file} {reason}") from None
