"""Model folders: reading one with every tensor accounted for, writing one complete or not at all."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig
from ..files import make_readable
from ..modeling_minimind import MiniMindForCausalLM
from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from ..processing_minimind_v import MiniMindVProcessor
from .report import ConversionError, explained, shorten


_MODEL_FILES = (
    *(".json", ".safetensors", ".bin", ".py", ".jinja", ".txt", ".model", ".md", ".onnx", ".gitattributes"),
    *(".gguf", "Modelfile"),
)


def load_config(source: str | Path, what: str) -> PreTrainedConfig:
    """The configuration of a folder or Hub id. `what` begins the message of the ConversionError where there is none."""
    with explained(f"{what}: no configuration can be loaded from there"):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration of ours, without memory for its parameters. Raises ConversionError if none can be built."""
    model_class = MiniMindVForConditionalGeneration if isinstance(config, MiniMindVConfig) else MiniMindForCausalLM
    with explained("no model of this configuration can be built"), init_empty_weights(include_buffers=False):
        return model_class(config)


def read_model_folder(folder: Path, with_encoder: bool = True) -> PreTrainedModel:
    """A model of this package, in the dtypes in which its tensors are stored.

    Without its encoder where that is not wanted; it may be missing then, as in a training checkpoint. Raises ConversionError
    where the folder is another model's, or a tensor is unknown, missing, misshapen, NaN or damaged.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} is no model folder: it has no config.json")
    config = load_config(folder, f"{folder / 'config.json'}")
    if not isinstance(config, (MiniMindVConfig, MiniMindVTextConfig)):
        raise ConversionError(f"{folder} holds a {config.model_type!r} model, where MiniMind-V or MiniMind was expected")
    decoder = config.get_text_config()
    if not isinstance(decoder, MiniMindVTextConfig):
        raise ConversionError(f"{folder} holds a MiniMind-V with the decoder {decoder.model_type!r}, expected MiniMind's")
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with explained(f"{file} is truncated or damaged"):
            tensors |= load_file(file)
    if not tensors:
        raise ConversionError(f"{folder} holds no weights: there is no model.safetensors")
    model = empty_model(config)
    if not with_encoder and isinstance(config, MiniMindVConfig):
        model.model.vision_tower = None
        tensors = {name: tensor for name, tensor in tensors.items() if ".vision_tower." not in name}
    tied = model.all_tied_weights_keys
    tensors |= {name: tensors[source] for name, source in tied.items() if name not in tensors and source in tensors}
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        problems = " ".join(str(error).split())
        raise ConversionError(f"{folder} does not hold the model of its config.json: {problems[:500]}") from None
    not_finite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if not_finite:
        raise ConversionError(f"{folder} has NaN or infinite values in {shorten(not_finite)}: convert another checkpoint")
    model.tie_weights()
    return model


def read_processor(
    folder: Path, config: PreTrainedConfig
) -> tuple[MiniMindVProcessor | PreTrainedTokenizerBase, GenerationConfig]:
    """The processor of a MiniMind-V or the tokenizer of a MiniMind, and how it answers: by default greedily.

    Raises ConversionError where they are missing or damaged.
    """
    with explained(f"{folder}: its processor, tokenizer or generation_config.json cannot be read"):
        processor = (MiniMindVProcessor if isinstance(config, MiniMindVConfig) else AutoTokenizer).from_pretrained(folder)
        is_saved = (folder / "generation_config.json").is_file()
        settings = GenerationConfig.from_pretrained(folder) if is_saved else GenerationConfig.from_model_config(config)
        return processor, settings


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Raise ConversionError for an output that would destroy something: an input, a file, or another folder than a model's."""
    resolved = output.resolve()
    for path in inputs:
        if path.exists() and resolved in (path.resolve(), *path.resolve().parents):
            raise ConversionError(f"--output {output} is or holds the input {path}: choose another folder")
    if output.exists() and not output.is_dir():
        raise ConversionError(f"--output {output} is a file, where a folder was expected")
    entries = sorted(output.iterdir()) if output.is_dir() else []
    if entries and not overwrite:
        raise ConversionError(f"--output {output} is not empty: choose another folder, or pass --overwrite to replace it")
    files = [file for entry in entries for file in (sorted(entry.glob("*")) if entry.name == "onnx" else [entry])]
    foreign = [file for file in files if not (file.is_file() and file.name.endswith(_MODEL_FILES))]
    is_model = (output / "config.json").is_file() or any(entry.suffix == ".gguf" for entry in entries)
    if foreign or (entries and not is_model):
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
