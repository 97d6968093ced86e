"""Native MiniMind-V weights to a complete Hub folder, with every tensor accounted for.

    python convert/from_native.py --weights sft_vlm_512.pth --vision-tower openai/clip-vit-base-patch16 \\
        --tokenizer path/to/minimind-v/model --output MiniMind2-Small-V

The weights are a `.pth` file of any release, dense or mixture of experts, a resume checkpoint, or a native folder with
pytorch_model.bin and config.json. Language-model weights without --vision-tower become a language model.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import HfApi

from minimind_v_hf.conversion import ConversionError, from_native
from minimind_v_hf.conversion.report import explained, run, warn


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, convert and upload. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", required=True, help="native .pth file, or native folder")
    add("--vision-tower", help="folder or Hub id of the image encoder (of CLIP or SigLIP, its vision half)")
    add("--tokenizer", required=True, help="folder or Hub id of the tokenizer that the model was trained with")
    add("--output", required=True, type=Path, help="folder to write")
    dtypes = ("float32", "float16", "bfloat16")
    add("--dtype", choices=dtypes, help="of all weights (default: as they are in their files)")
    heads = "of queries; MiniMind2 files do not tell (default: 8, as published, with a warning)"
    add("--num-attention-heads", type=int, metavar="N", help=heads)
    add("--num-experts-per-tok", type=int, metavar="N", help="experts per token (default: 2, for minimind-3 1)")
    add("--inference-rope-scaling", action="store_true", help="longer contexts with YaRN, as the native option of this name")
    add("--max-position-embeddings", type=int, metavar="N", help="longest sequence in tokens (default: 32768)")
    add("--overwrite", action="store_true", help="replace a model folder that is there already")
    add("--push-to-hub", metavar="USER/NAME", help="upload the folder too")
    add("--private", action="store_true", help="create the Hub repository as a private one")
    options = vars(parser.parse_args(argv))
    repo_id, private = options.pop("push_to_hub"), options.pop("private")
    options["dtype"] = options["dtype"] and getattr(torch, options["dtype"])

    def convert_and_push() -> None:
        if repo_id:
            check_hub(repo_id)
        elif private:
            raise ConversionError("--private tells how to create a Hub repository: pass --push-to-hub user/name too")
        from_native.convert(**options, name=repo_id)
        if repo_id:
            push(options["output"], repo_id, private)

    return run(convert_and_push)


def check_hub(repo_id: str) -> None:
    """Tell at once if the upload at the end will fail. Raises ConversionError where the name can be no repository's."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ConversionError(f"--push-to-hub {repo_id}: expected user/name")
    try:
        HfApi().whoami()
    except Exception as error:  # no token, no network, and what else a client may raise
        warn(f"the Hub cannot be written to now ({error}): the folder will be written, but perhaps not uploaded")


def push(folder: Path, repo_id: str, private: bool) -> None:
    """Upload a complete folder. Raises ConversionError where the Hub refuses, or is out of reach."""
    advice = f"Log in with `hf auth login`, then run `hf upload {repo_id} {folder}`"
    with explained(f"{folder} is complete, but was not uploaded. {advice}"):
        url = HfApi().create_repo(repo_id, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Convert from native MiniMind-V weights")
    print(f"Uploaded to {url}")


if __name__ == "__main__":
    sys.exit(main())
