"""A converted folder to a model that transformers and others know without our code, where that is exactly possible.

    python convert/to_llava.py --model MiniMind2-Small-V --output MiniMind2-Small-V-llava

MiniMind2-V becomes LLaVA: its projector of one linear layer is followed by an identity. A MiniMind language model alone
becomes Llama, with q/k norm Qwen3, and with q/k norm and experts Qwen3-MoE. Other models are refused, with the reason.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from minimind_v_hf.conversion import to_llava
from minimind_v_hf.conversion.report import run


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and convert. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder of a MiniMind-V or MiniMind model of this package")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--gelu",
        action="store_true",
        help="a projector with a GELU that changes nothing, in float32: for engines that always compute one, as mlx-vlm does",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there already")
    options = vars(parser.parse_args(argv))
    return run(lambda: to_llava.convert(**options))


if __name__ == "__main__":
    sys.exit(main())
