"""A model folder to GGUF files for llama.cpp and what is built on it, Ollama say.

    python convert/to_gguf.py --model MiniMind2-Small-V --output MiniMind2-Small-V-gguf --dtype q8_0 q4_0

Writes the decoder in each dtype, the encoder with its projector (mmproj), a Modelfile for Ollama and a card. Where the
package xllamacpp is installed, what llama.cpp computes from the files is compared with the model. A model that no graph of
llama.cpp computes is refused, with the reason.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from minimind_v_hf.conversion import to_gguf
from minimind_v_hf.conversion.report import run


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and convert. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder of a MiniMind-V or MiniMind model of this package")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--dtype", nargs="+", dest="dtypes", choices=to_gguf.DTYPES, default=["f16"], help="(default: f16)")
    parser.add_argument(
        "--class-token",
        choices=to_gguf.CLASS_TOKENS,
        default="last",
        help="where llama.cpp puts CLIP's class token: last (default), or first in builds with the fix of its issue 25814",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there already")
    options = vars(parser.parse_args(argv))
    return run(lambda: to_gguf.convert(**options))


if __name__ == "__main__":
    sys.exit(main())
