"""A converted folder back to native MiniMind-V weights, in the names of the release that it came from."""

import tempfile
from pathlib import Path

import torch

from ..configuration_minimind_v import MiniMindVTextConfig
from .architecture import FIRST_NAMES, RELEASES
from .folders import read_model_folder
from .key_table import Generation, key_table, to_native
from .report import ConversionError, explained, print_table


def convert(model: str | Path, output: str | Path, *, overwrite: bool = False) -> None:
    """Write a native `.pth` file, without the image encoder as native files are, and print what native scripts must be told.

    Args:
        model: folder of a MiniMind-V or MiniMind model of this package.
        output: the file to write; it is there complete or not at all.
        overwrite: replace a file that is there already.

    Raises:
        ConversionError: native MiniMind-V has no such model, or the folder is damaged. No file is written then.
    """
    model, output = Path(model), Path(output)
    if output.is_dir():
        raise ConversionError(f"--output {output} is a folder, where a .pth file was expected")
    if output.exists() and not overwrite:
        raise ConversionError(f"--output {output} is there already: choose another name, or pass --overwrite")
    ours = read_model_folder(model, with_encoder=False)
    latest: Generation = "minimind-3" if ours.config.get_text_config().use_qk_norm else "minimind2"
    generation: Generation = getattr(ours.config, "native_generation", latest)  # a model made here has none
    with explained(f"{model} has no native form"):
        state_dict = to_native(ours.state_dict(), key_table(ours.config, generation))
    print_table(f"Native model of {model}", native_options(ours.config.get_text_config(), generation))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as work:
        torch.save(state_dict, Path(work, output.name))
        Path(work, output.name).replace(output)
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()}))
    print(f"\n{len(state_dict)} tensors ({dtypes}) without the image encoder, written to {output}")


def native_options(text: MiniMindVTextConfig, generation: Generation) -> list[tuple[str, object]]:
    """What native MiniMind-V cannot read from the file: fields of its configuration, as a table."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    native = FIRST_NAMES if generation == "minimind2-2025-02" else {}
    rows: list[tuple[str, object]] = [("release", RELEASES[generation]), ("use_moe", bool(text.num_experts))]
    rows += [(native.get(name, name), getattr(text, name)) for name in names]
    if text.num_experts:
        rows.append(("num_experts_per_tok", text.num_experts_per_tok))
    if text.rope_parameters["rope_type"] == "yarn":
        rows.append(("inference_rope_scaling", True))
    return rows
