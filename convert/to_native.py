"""A converted folder back to native MiniMind-V weights, in the names of the release that it came from.

    python convert/to_native.py --model MiniMind2-Small-V --output sft_vlm_512.pth

Native files leave out the image encoder, so this one does too. What the native scripts must be told is printed.
"""

from collections.abc import Sequence

from minimind_v_hf.conversion import to_native
from minimind_v_hf.conversion.command_line import MODEL, converter_parser, run


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert."""
    run(to_native.convert, vars(converter_parser(__doc__, model=MODEL).parse_args(argv)))


if __name__ == "__main__":
    main()
