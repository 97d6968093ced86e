"""A model folder to GGUF files for llama.cpp and what is built on it, Ollama say.

    python convert/to_gguf.py --model MiniMind2-Small-V --output MiniMind2-Small-V-gguf --dtype q8_0 q4_0

Writes the decoder in each dtype, the encoder with its projector (mmproj), a Modelfile for Ollama and a card. Where the
package xllamacpp is installed, what llama.cpp computes from the files is compared with the model. A model that no graph of
llama.cpp computes is refused, with the reason.
"""

from collections.abc import Sequence

from minimind_v_hf.conversion import to_gguf
from minimind_v_hf.conversion.command_line import MODEL, converter_parser, run


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert."""
    parser = converter_parser(__doc__, model=MODEL)
    parser.add_argument(
        "--dtype",
        nargs="+",
        dest="dtypes",
        choices=to_gguf.DTYPES,
        default=["f16"],
        help="of the decoder; the Modelfile and the card's example take the first (default: f16)",
    )
    parser.add_argument(
        "--class-token",
        choices=to_gguf.CLASS_TOKENS,
        default="last",
        help="where llama.cpp puts CLIP's class token: last (default), or first in builds with the fix of its issue 25814",
    )
    run(to_gguf.convert, vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
