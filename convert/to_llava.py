"""A converted folder to a model that transformers and others know without our code, where that is exactly possible.

    python convert/to_llava.py --model MiniMind2-Small-V --output MiniMind2-Small-V-llava

MiniMind2-V becomes LLaVA: its projector of one linear layer is followed by an identity. A MiniMind language model alone
becomes Llama, with q/k norm Qwen3, and with q/k norm and experts Qwen3-MoE. Other models are refused, with the reason.
"""

from collections.abc import Sequence

from minimind_v_hf.conversion import to_llava
from minimind_v_hf.conversion.command_line import MODEL, converter_parser, run


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert."""
    parser = converter_parser(__doc__, model=MODEL)
    parser.add_argument(
        "--gelu",
        action="store_true",
        help="a projector with a GELU that changes nothing, in float32: for engines that always compute one, as mlx-vlm does",
    )
    run(to_llava.convert, vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
