"""A model folder to ONNX, for ONNX Runtime and, in a browser, transformers.js.

    python convert/to_onnx.py --model runs/quickstart/model --output runs/quickstart/onnx --dtype fp32 q8 q4

In float32, the graphs must give the greedy tokens of the model. How well the other precisions answer is printed, and stands
in the folder's README.md. The folder is a --model for chat.py, web_demo.py and evaluate.py.
"""

from collections.abc import Sequence
from pathlib import Path

from minimind_v_hf.conversion import to_onnx
from minimind_v_hf.conversion.command_line import converter_parser, run


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and export."""
    parser = converter_parser(__doc__, model="folder of a MiniMind-V of this package")
    parser.add_argument(
        "--dtype", nargs="+", choices=to_onnx.PRECISIONS, default=["fp32", "q8", "q4"], help="precisions (default: fp32 q8 q4)"
    )
    parser.add_argument("--images", nargs="+", default=[], type=Path, help="images to compare answers on (default: drawn ones)")
    run(to_onnx.convert, vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
