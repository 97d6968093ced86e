"""Model folders: reading one with every tensor accounted for, writing one complete or not at all."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig
from ..files import make_readable
from ..modeling_minimind import MiniMindForCausalLM
from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from .audit import FLOAT_DTYPES
from .native_files import ConversionError, first_line
from .report import shorten


_MODEL_FILES = (".json", ".safetensors", ".bin", ".py", ".jinja", ".txt", ".model", ".md", ".gitattributes")


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_config(source: str | Path, what: str) -> PreTrainedConfig:
    """The configuration of a folder or Hub id. `what` begins the message of the ConversionError where there is none."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a damaged config.json makes its class raise
        raise ConversionError(f"{what}: no configuration can be loaded from there ({first_line(error)})") from None


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration of ours, without memory for its parameters.

    Raises:
        ConversionError: there is no such model.
    """
    model_class = MiniMindVForConditionalGeneration if isinstance(config, MiniMindVConfig) else MiniMindForCausalLM
    try:
        with init_empty_weights(include_buffers=False):
            return model_class(config)
    except Exception as error:  # whatever an odd configuration of an encoder makes its class raise
        raise ConversionError(f"no model of this configuration can be built ({first_line(error)})") from None


def read_model_folder(
    folder: Path, with_encoder: bool = True
) -> tuple[MiniMindVConfig | MiniMindVTextConfig, dict[str, torch.Tensor]]:
    """The configuration and the tensors of a model of this package, as they are stored.

    Args:
        folder: written by `save_pretrained`.
        with_encoder: False leaves the image encoder out; it may be missing then, as in a training checkpoint.

    Returns:
        The configuration, and the tensors by our names; of tied embeddings, both.

    Raises:
        ConversionError: it is another model's, or a tensor is unknown, missing, misshapen or damaged.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} is no model folder: it has no config.json")
    config = load_config(folder, f"{folder / 'config.json'}")
    if not isinstance(config, (MiniMindVConfig, MiniMindVTextConfig)):
        raise ConversionError(f"{folder} holds a {config.model_type!r} model, where MiniMind-V or MiniMind was expected")
    decoder = config.get_text_config()
    if not isinstance(decoder, MiniMindVTextConfig):
        raise ConversionError(
            f"{folder} holds a MiniMind-V with the decoder {decoder.model_type!r}, where MiniMind was expected"
        )
    stored: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        try:
            stored |= load_file(file)
        except Exception as error:  # whatever a damaged file makes its reader raise
            raise ConversionError(f"{file} is truncated or damaged ({first_line(error)})") from None
    if decoder.num_hidden_layers > len(stored):
        raise ConversionError(f"{folder}: num_hidden_layers={decoder.num_hidden_layers}, but there are {len(stored)} tensors")
    model = empty_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = getattr(model, "all_tied_weights_keys", {}) if config.tie_word_embeddings else {}
    stored |= {name: stored[source] for name, source in tied.items() if name not in stored and source in stored}
    if not with_encoder:
        stored = {name: tensor for name, tensor in stored.items() if ".vision_tower." not in name}
        shapes = {name: shape for name, shape in shapes.items() if ".vision_tower." not in name}
    problems = [f"{name} is missing" for name in shapes if name not in stored]
    for name, tensor in stored.items():
        if name not in shapes:
            problems.append(f"{name} is unknown")
        elif tuple(tensor.shape) != shapes[name]:
            problems.append(f"{name} is {tuple(tensor.shape)}, expected {shapes[name]}")
        elif tensor.dtype not in FLOAT_DTYPES:
            problems.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected float32, float16 or bfloat16")
    if problems:
        raise ConversionError(f"{folder} does not hold the model of its config.json: {shorten(problems)}")
    return config, stored


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read: one, or those of the index."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ConversionError(f"{folder} holds no weights: there is no model.safetensors")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{index} is no index of weights ({first_line(error)})") from None


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse an output that would destroy something, before any work is done.

    Args:
        output: the folder to be written.
        overwrite: whether a model folder that is there may be replaced.
        inputs: files and folders that the conversion reads.

    Raises:
        ConversionError: the output is a file, holds something, or holds one of the inputs.
    """
    resolved = output.resolve()
    for path in inputs:
        if path.exists() and (path.resolve() == resolved or resolved in path.resolve().parents):
            raise ConversionError(f"--output {output} is or holds the input {path}: choose another folder")
    if output.exists() and not output.is_dir():
        raise ConversionError(f"--output {output} is a file, where a folder was expected")
    entries = sorted(output.iterdir()) if output.is_dir() else []
    if entries and not overwrite:
        raise ConversionError(f"--output {output} is not empty: choose another folder, or pass --overwrite to replace it")
    foreign = [entry for entry in entries if not (entry.is_file() and entry.name.endswith(_MODEL_FILES))]
    if foreign or (entries and not (output / "config.json").is_file()):
        reason = f"it holds {foreign[0].name}" if foreign else "it has no config.json"
        raise ConversionError(f"--overwrite replaces model folders only, and {output} is none: {reason}. Choose another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`, which takes its place at the end, and vanishes where something goes wrong."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as work:
        staging, old = Path(work, "new"), Path(work, "old")
        staging.mkdir()
        yield staging
        make_readable(staging)
        if output.exists():
            output.rename(old)
        staging.rename(output)
        shutil.rmtree(old, ignore_errors=True)


def save_model(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Write model, configuration and code; the configuration names `dtype`, also where the encoder is stored in another.

    Args:
        model: what to write.
        folder: where to.
        dtype: what the configuration names.
        state_dict: the tensors, where other names are wanted than the model's own.
    """
    model.save_pretrained(folder, max_shard_size="5GB", state_dict=state_dict)
    model.config.dtype = dtype  # transformers writes that of the first tensor, which is the encoder's
    model.config.save_pretrained(folder)
