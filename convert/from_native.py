"""Native MiniMind-V weights to a complete Hub folder, with every tensor accounted for.

    python convert/from_native.py --weights sft_vlm_512.pth --vision-tower openai/clip-vit-base-patch16 \\
        --tokenizer path/to/minimind-v/model --output MiniMind2-Small-V

The weights are a `.pth` file of any release, dense or mixture of experts, a resume checkpoint, or a native folder with
pytorch_model.bin and config.json. Language-model weights without --vision-tower become a language model.
"""

from collections.abc import Sequence

from minimind_v_hf.conversion import from_native
from minimind_v_hf.conversion.command_line import converter_parser, run


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert."""
    tokenizer = "folder or Hub id of the tokenizer that the model was trained with"
    parser = converter_parser(__doc__, weights="native .pth file, or native folder", tokenizer=tokenizer)
    add = parser.add_argument
    add("--vision-tower", help="folder or Hub id of the image encoder (of CLIP or SigLIP, its vision half)")
    heads = "of queries; MiniMind2 files do not tell (default: 8, as published, with a warning)"
    add("--num-attention-heads", type=int, metavar="N", help=heads)
    add("--num-experts-per-tok", type=int, metavar="N", help="experts per token (default: 2, for minimind-3 1)")
    run(from_native.convert, vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
