"""A converted folder back to native MiniMind-V weights, in the names of the release that it came from.

    python convert/to_native.py --model MiniMind2-Small-V --output sft_vlm_512.pth

Native files leave out the image encoder, so this one does too. What the native scripts must be told is printed.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from convert.architecture import DEFAULT_HEADS, RELEASES
from convert.from_native import DTYPES
from convert.key_table import Generation, Row, key_table
from convert.native_files import ConversionError
from convert.output import open_folder
from convert.report import print_table, run
from minimind_v_hf import MiniMindVConfig, MiniMindVTextConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and convert. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder of a MiniMind-V or MiniMind model of this package")
    parser.add_argument("--output", required=True, type=Path, help=".pth file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights (default: as they are stored)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    arguments = parser.parse_args(argv)
    return run(lambda: convert(arguments))


def convert(arguments: argparse.Namespace) -> None:
    """The whole conversion, from the arguments of the command line.

    Raises:
        ConversionError: native MiniMind-V has no such model, or the folder is incomplete. No file is written then.
    """
    output = arguments.output
    if output.is_dir():
        raise ConversionError(f"--output {output} is a folder, where a .pth file was expected")
    if output.exists() and not arguments.overwrite:
        raise ConversionError(f"--output {output} is there already: choose another name, or pass --overwrite")
    config = load_config(arguments.model)
    generation = native_generation(config)
    try:
        table = key_table(config, generation)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    print_table(f"Native model of {arguments.model}", native_options(config, generation))

    with open_folder(arguments.model) as (names, tensor_of):
        left_out = [name for name in names if ".vision_tower." in name]
        unknown = sorted(set(names) - {row.ours for row in table} - set(left_out))
        missing = [row.ours for row in table if row.ours not in names and row.ours != "lm_head.weight"]
        if unknown or missing:
            problems = [(name, "unknown") for name in unknown] + [(name, "missing") for name in missing]
            print_table("Problems", problems)
            raise ConversionError(f"{arguments.model} does not hold the model of its config.json ({len(problems)} problems)")
        state_dict: dict[str, torch.Tensor] = {}
        for row in table:
            name = _embedding(table) if row.ours not in names else row.ours  # safetensors holds a shared tensor once
            tensor = tensor_of(name)
            tensor = tensor.to(DTYPES[arguments.dtype]) if arguments.dtype else tensor
            parts = row.transform.to_native(tensor, len(row.native))
            # Clones, so that a part does not bring its whole with it into the file
            state_dict |= {
                native: part if part.numel() == tensor.numel() else part.clone()
                for native, part in zip(row.native, parts, strict=True)
            }
        save(state_dict, output)
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()}))
    print_table("Tensors", [("written", str(len(state_dict)), dtypes), ("left out", str(len(left_out)), "the image encoder")])
    print(f"\nWritten to {output}")


def _embedding(table: list[Row]) -> str:
    return next(row.ours for row in table if row.ours.endswith("embed_tokens.weight"))


def load_config(folder: Path) -> MiniMindVConfig | MiniMindVTextConfig:
    """The configuration of a model of this package.

    Raises:
        ConversionError: there is none, or it is another model's.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} is no model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config.get_text_config(), MiniMindVTextConfig):
        found = config.model_type if config.model_type != MiniMindVConfig.model_type else config.get_text_config().model_type
        raise ConversionError(f"{folder} holds a {found!r} model, where MiniMind-V or MiniMind was expected")
    return config


def native_generation(config: MiniMindVConfig | MiniMindVTextConfig) -> Generation:
    """The release whose names a model came with; for one made here, the latest that fits."""
    remembered = getattr(config, "native_generation", None)
    if remembered in RELEASES:
        return remembered
    return "minimind-3" if config.get_text_config().use_qk_norm else "minimind2"


def native_options(config: MiniMindVConfig | MiniMindVTextConfig, generation: Generation) -> list[tuple[str, str]]:
    """What native MiniMind-V cannot read from the file: fields of its configuration, as a table."""
    text = config.get_text_config()
    first = generation == "minimind2-2025-02"
    rows = [("release", RELEASES[generation])]
    rows += [("dim" if first else "hidden_size", str(text.hidden_size))]
    rows += [("n_layers" if first else "num_hidden_layers", str(text.num_hidden_layers))]
    heads = f"{text.num_attention_heads}" + ("" if text.num_attention_heads == DEFAULT_HEADS else " (not the default)")
    rows += [("n_heads" if first else "num_attention_heads", heads)]
    rows += [("n_kv_heads" if first else "num_key_value_heads", str(text.num_key_value_heads))]
    rows += [("use_moe", str(bool(text.num_experts)))]
    if text.num_experts:
        rows += [("num_experts_per_tok", str(text.num_experts_per_tok))]
    if text.rope_parameters["rope_type"] == "yarn":
        rows += [("inference_rope_scaling", "True")]
    return rows


def save(state_dict: dict[str, torch.Tensor], output: Path) -> None:
    """Write a file that is there complete or not at all."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as work:
        unfinished = Path(work, output.name)
        torch.save(state_dict, unfinished)
        unfinished.replace(output)


if __name__ == "__main__":
    sys.exit(main())
