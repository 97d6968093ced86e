"""A converted folder back to native MiniMind-V weights, in the names of the release that it came from."""

import tempfile
from pathlib import Path

import torch

from ..configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig
from .architecture import DEFAULT_HEADS, RELEASES
from .folders import read_model_folder
from .key_table import Generation, key_table, to_native
from .report import ConversionError, explained, print_table


def convert(model: str | Path, output: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
    """Write a native `.pth` file, without the image encoder as native files are, and print what native scripts must be told.

    Args:
        model: folder of a MiniMind-V or MiniMind model of this package.
        output: the file to write; it is there complete or not at all.
        dtype: of all weights; by default as they are stored.
        overwrite: replace a file that is there already.

    Raises:
        ConversionError: native MiniMind-V has no such model, or the folder is damaged. No file is written then.
    """
    model, output = Path(model), Path(output)
    if output.is_dir():
        raise ConversionError(f"--output {output} is a folder, where a .pth file was expected")
    if output.exists() and not overwrite:
        raise ConversionError(f"--output {output} is there already: choose another name, or pass --overwrite")
    config, tensors = read_model_folder(model, with_encoder=False)
    latest: Generation = "minimind-3" if config.get_text_config().use_qk_norm else "minimind2"
    generation: Generation = getattr(config, "native_generation", latest)  # a model made here has none
    with explained(f"{model} has no native form"):
        table = key_table(config, generation)
    print_table(f"Native model of {model}", native_options(config, generation))
    state_dict = {name: tensor.to(dtype or tensor.dtype) for name, tensor in to_native(tensors, table).items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as work:
        torch.save(state_dict, Path(work, output.name))
        Path(work, output.name).replace(output)
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()}))
    print(f"\n{len(state_dict)} tensors ({dtypes}) without the image encoder, written to {output}")


def native_options(config: MiniMindVConfig | MiniMindVTextConfig, generation: Generation) -> list[tuple[str, object]]:
    """What native MiniMind-V cannot read from the file: fields of its configuration, as a table."""
    text = config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    native = ("dim", "n_layers", "n_heads", "n_kv_heads") if generation == "minimind2-2025-02" else names
    rows: list[tuple[str, object]] = [("release", RELEASES[generation])]
    rows += [(theirs, getattr(text, ours)) for ours, theirs in zip(names, native, strict=True)]
    if text.num_attention_heads != DEFAULT_HEADS:
        rows[3] = (native[2], f"{text.num_attention_heads} (not the default)")
    rows.append(("use_moe", bool(text.num_experts)))
    if text.num_experts:
        rows.append(("num_experts_per_tok", text.num_experts_per_tok))
    if text.rope_parameters["rope_type"] == "yarn":
        rows.append(("inference_rope_scaling", True))
    return rows
