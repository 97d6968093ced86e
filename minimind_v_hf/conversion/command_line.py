"""What the command lines of the converters have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..scripts import errors_in_one_line


MODEL = "folder of a MiniMind-V or MiniMind model of this package"


def converter_parser(description: str | None, **sources: str) -> argparse.ArgumentParser:
    """A parser that knows --output, --overwrite and what is read: required options, by name, with their help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, explanation in sources.items():
        parser.add_argument(f"--{name}", required=True, help=explanation)
    parser.add_argument("--output", required=True, type=Path, help="what to write: a folder, or of to_native a .pth file")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote there")
    return parser


def run(convert: Callable[..., object], options: dict[str, Any]) -> None:
    """Convert; what is wrong with the files or options is one line, with exit code 2."""
    if logging.get_verbosity() == logging.WARNING:  # nobody asked for another
        logging.set_verbosity_error()  # our reports say what transformers would, tensor by tensor
    logging.disable_progress_bar()
    with errors_in_one_line():
        convert(**options)
