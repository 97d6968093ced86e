"""A converted folder back to native MiniMind-V weights, in the names of the release that it came from.

    python convert/to_native.py --model MiniMind2-Small-V --output sft_vlm_512.pth

Native files leave out the image encoder, so this one does too. What the native scripts must be told is printed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from minimind_v_hf.conversion import to_native
from minimind_v_hf.conversion.report import run


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and convert. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder of a MiniMind-V or MiniMind model of this package")
    parser.add_argument("--output", required=True, type=Path, help=".pth file to write")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of all weights (default: as stored)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    options = vars(parser.parse_args(argv))
    options["dtype"] = options["dtype"] and getattr(torch, options["dtype"])
    return run(lambda: to_native.convert(**options))


if __name__ == "__main__":
    sys.exit(main())
