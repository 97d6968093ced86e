"""Reading native MiniMind-V weights, without trusting them: `.pth` files, resume checkpoints and native folders.

Nothing in a file is ever executed. What is not a native file is refused with the reason.
"""

import json
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


class ConversionError(ValueError):
    """Why a conversion cannot be done, in one line for the person who asked for it."""


def first_line(error: Exception) -> str:
    """What an exception says, without what libraries add below."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@dataclass
class NativeWeights:
    """What a native file holds.

    Args:
        path: the file or folder.
        tensors: the state dict, by native names: dense, on the CPU.
        config: config.json of a native folder; empty for a file.
        other_entries: what a resume checkpoint holds besides the weights, by name.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    other_entries: list[str] = field(default_factory=list)


def read_native_weights(path: Path) -> NativeWeights:
    """Read a `.pth` file, a resume checkpoint, or a folder with pytorch_model.bin and config.json.

    Raises:
        ConversionError: there is no such file, it is damaged or of another kind, or it wants to execute code.
    """
    config = _read_native_config(path) if path.is_dir() else {}
    file = path / "pytorch_model.bin" if path.is_dir() else path
    if not file.is_file():
        raise ConversionError(f"there is no file {file}")
    _check_kind(file)
    content = _load(file)
    other_entries: list[str] = []
    if isinstance(content, dict) and isinstance(content.get("model"), dict):  # a resume checkpoint
        other_entries = sorted(str(name) for name in content if name != "model")
        content = content["model"]
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds a {type(content).__name__}, where a state dict was expected")
    if not content:
        raise ConversionError(f"{file} holds no tensors")
    for name, tensor in content.items():
        _check_entry(file, name, tensor)
    return NativeWeights(path, content, config, other_entries)


def _check_entry(file: Path, name: Any, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ConversionError(f"{file} is no state dict: its entry {name!r} is a {type(tensor).__name__}, not a tensor")
    if not isinstance(name, str) or not name.isprintable():
        raise ConversionError(f"{file} is no state dict: the name of a tensor is the {type(name).__name__} {name!a}")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        kind = "quantised" if tensor.is_quantized else "without values" if tensor.is_meta else "sparse or nested"
        raise ConversionError(f"{file}: the tensor {name} is {kind}, where a dense one was expected")
    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > stored:
        shape = "x".join(map(str, tensor.shape))
        raise ConversionError(f"{file}: the tensor {name} claims {shape} values, but the file has {stored} for it")


def _read_native_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ConversionError(f"{folder} is no native folder: it has no config.json (pass a .pth file by its full name)")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{file} holds no configuration ({first_line(error)})") from None
    if model_type in ("minimind_v", "minimind_v_text"):
        raise ConversionError(f"{folder} is converted already (model_type {model_type!r})")
    if model_type not in ("minimind", "minimind-v"):
        raise ConversionError(
            f"{folder} is no native folder: its config.json has model_type {model_type!r}, not 'minimind' or 'minimind-v'"
        )
    return config


def _check_kind(file: Path) -> None:
    """Refuse by their first bytes files of which torch would only say that it cannot read them."""
    with file.open("rb") as stream:
        head = stream.read(64)
    if not head:
        raise ConversionError(f"{file} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{file} is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size:
        raise ConversionError(f"{file} is a safetensors file, where a native .pth file was expected")
    if head.startswith(b"PK"):
        _check_zip(file)
    elif not head.startswith(b"\x80"):  # the old format is a bare pickle
        raise ConversionError(f"{file} is not a PyTorch checkpoint (it begins with {head[:16]!r})")


def _check_zip(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name.split("/", 1)[-1] for name in archive.namelist()}
            if "data.pkl" not in names or "constants.pkl" in names:  # the second is of TorchScript
                raise ConversionError(f"{file} is a zip archive, but not a PyTorch checkpoint")
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ConversionError(f"{file} is a compressed zip archive, which PyTorch does not write")
            damaged = archive.testzip()  # torch itself does not check the checksums
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ConversionError(f"{file} is truncated or damaged ({error}): fetch it again") from None
    if damaged is not None:
        raise ConversionError(f"{file} is damaged: the checksum of {damaged} does not fit. Fetch it again")


def _load(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Not mapped into memory: this way each tensor can be let go of as soon as it is converted
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise ConversionError(
                f"{file} was refused: its pickle wants to call {wanted[1]}, but weights need no code of their own. "
                "Nothing of it was executed"
            ) from None
        raise ConversionError(f"{file} is not a PyTorch checkpoint, or is damaged") from None
    except Exception as error:  # whatever a damaged pickle makes its reader raise
        raise ConversionError(f"{file} is truncated or damaged ({first_line(error)})") from None
