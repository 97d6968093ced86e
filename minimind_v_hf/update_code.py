"""The code files of saved model folders, brought up to date in place.

    python -m minimind_v_hf.update_code MODEL_FOLDER [MODEL_FOLDER ...]

A saved folder carries the code of the version that wrote it, which a later transformers may run wrongly. This replaces
the code by that of the installed package. Weights, tokenizer and every value of the configuration stay as they are.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig
from .files import write_file


_FORMER_FILES = ("modeling_minimind_v.py", "video_minimind_v.py")
"""Code files of earlier layouts; the first also held the decoder, and a language model alone needs it no more."""


def update_code(folder: str | Path) -> list[str]:
    """Bring the code files of a saved model folder, and the `auto_map` that names them, up to date.

    Files that differ are replaced one by one, each through a temporary name, and code files of earlier layouts that
    nothing imports any more are removed. An interrupted update is completed by the next one.

    Args:
        folder: of a MiniMind-V or MiniMind model, or a checkpoint of one.

    Returns:
        What was done, a line for each file: `replaced …`, `added …`, `removed …`. Empty where all was up to date.

    Raises:
        ValueError: the folder holds another kind of model, or a configuration that the present code refuses.
        OSError: the folder has no config.json, or cannot be written.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no model folder: it has no config.json.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, (MiniMindVConfig, MiniMindVTextConfig)):
        raise ValueError(
            f"{folder} holds a {config.model_type!r} model: only MiniMind-V and MiniMind carry code of this package."
        )

    changes = []
    sources = _code_files(config)
    for source in sources:
        changes += _write(folder / source.name, source.read_bytes())
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if content.get("auto_map") != config.hub_auto_map:
        content["auto_map"] = config.hub_auto_map
        changes += _write(folder / "config.json", (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    needed = {source.name for source in sources}
    for name in _FORMER_FILES:
        imported = {Path(name).name for file in folder.glob("*.py") for name in get_relative_import_files(file)}
        if name not in needed | imported and (folder / name).is_file():
            (folder / name).unlink()
            changes.append(f"removed {name}")
    return changes


def _code_files(config: MiniMindVConfig | MiniMindVTextConfig) -> list[Path]:
    """The files of this package that a folder of such a model carries; those that others import come first."""
    package = Path(__file__).parent
    files: dict[Path, None] = {}
    for reference in config.hub_auto_map.values():
        file = package / f"{reference.split('.')[0]}.py"
        files |= dict.fromkeys([*(Path(name) for name in reversed(get_relative_import_files(file))), file])
    return list(files)


def _write(path: Path, content: bytes) -> list[str]:
    """Replace a file whose content differs, and say so."""
    exists = path.is_file()
    if exists and path.read_bytes() == content:
        return []
    write_file(path, content)
    return [f"{'replaced' if exists else 'added'} {path.name}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Update the folders of a command line. Returns 2 where one of them was refused, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m minimind_v_hf.update_code",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="MODEL_FOLDER", help="folder written by save_pretrained")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    code = 0
    for number, folder in enumerate(arguments.folders, 1):
        count = f"[{number}/{len(arguments.folders)}] " if len(arguments.folders) > 1 else ""
        try:
            changes = update_code(folder)
        except (ValueError, OSError, RecursionError, ArithmeticError, TypeError) as error:  # what a damaged config.json raises
            print(f"error: {folder}: {' '.join(str(error).split())}", file=sys.stderr)
            code = 2
        else:
            print(f"{count}{folder}: {', '.join(changes) or 'up to date'}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
