"""Draw where a model looks: which parts of an image each token of its answer attended to.

    python examples/attention_map.py --model runs/quickstart/model --image photo.jpg "Where is the red shape?"

Each small image belongs to one piece of the answer: the brighter a patch, the more the decoder attended to it while it chose
that piece. The percentage is the share of all attention that went to images; the rest went to the words. The heads of a
layer are averaged, and the layers too unless one is chosen. The image is shown as the model sees it: cropped and small.

Attention weights say where information could come from, not that it was used. What a patch holds has been mixed with its
surroundings by the encoder, too.
"""

import argparse
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minimind_v_hf.chat import encode_questions, load_model
from minimind_v_hf.scripts import errors_in_one_line


COLUMNS = 6


@dataclass
class Look:
    """Where the model looked while it chose one piece of its answer.

    Args:
        text: the piece.
        maps: attention to the patches of each image, (images, rows, columns); all its values sum to `share`.
        share: of all attention, what went to the images, from 0 to 1.
    """

    text: str
    maps: np.ndarray
    share: float


def attention_maps(model, processor, inputs, max_new_tokens: int = 32, layer: int | None = None) -> list[Look]:
    """Let a model answer greedily, and note where it looks.

    Args:
        model: loaded with `attn_implementation="eager"`, since the faster kernels keep no weights.
        inputs: one prompt with its images, as the processor gives it.
        max_new_tokens: longest answer.
        layer: of the decoder, counted from 0, or from the end if negative; None for the mean of all.

    Raises:
        ValueError: there is no such layer, or no image.
    """
    layers = model.config.get_text_config().num_hidden_layers
    if layer is not None and not -layers <= layer < layers:
        raise ValueError(f"layer={layer}: this model has the layers 0 to {layers - 1}")
    ids = inputs["input_ids"]
    places = (ids[0] == processor.image_token_id).nonzero()[:, 0]
    if not len(places):
        raise ValueError("there is no image in the prompt")
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    answer = output.sequences[0, ids.shape[1] :].tolist()
    joined = model.config.patches_per_token
    side = math.isqrt(processor.image_seq_length * joined)

    looks, pending = [], []
    for token, step in zip(answer, output.attentions, strict=True):
        if token in processor.tokenizer.all_special_ids:
            continue
        chosen = step if layer is None else [step[layer]]
        # Of the last query, which chose the token: (layers, heads, keys) to (image tokens)
        weights = torch.stack([one[0, :, -1] for one in chosen]).float().mean(dim=(0, 1))[places]
        patches = (weights / joined).repeat_interleave(joined)
        pending.append((token, patches.view(-1, side, side).cpu().numpy()))
        text = processor.tokenizer.decode([token for token, _ in pending])
        if "\ufffd" in text and token != answer[-1]:
            continue  # half a character: its tokens belong together
        maps = np.mean([patches for _, patches in pending], axis=0)
        looks.append(Look(text, maps, float(maps.sum())))
        pending = []
    return looks


def images_as_encoded(processor, pixel_values: torch.Tensor) -> np.ndarray:
    """What the encoder is given, as colours again: (images, height, width, 3) from 0 to 1."""
    mean, std = (np.asarray(values) for values in (processor.image_processor.image_mean, processor.image_processor.image_std))
    return (pixel_values.float().cpu().numpy().transpose(0, 2, 3, 1) * std + mean).clip(0, 1)


def draw_looks(looks: list[Look], images: np.ndarray, question: str, path: Path) -> None:
    """Draw the images with where the attention went, once for each piece of the answer, as a PNG file."""
    # Here, so that --help works without it
    import matplotlib
    from matplotlib.figure import Figure

    from minimind_v_hf.drawing import font_names

    cells = [(look, number) for look in looks for number in range(len(images))]
    columns = min(COLUMNS * len(images) if len(images) < 3 else COLUMNS, len(cells) + 1)
    lines = math.ceil((len(cells) + 1) / columns)
    with matplotlib.rc_context({"font.family": font_names()}):
        figure = Figure(figsize=(columns * 2, lines * 2.35 + 0.5), layout="constrained")
        figure.suptitle(" ".join(question.split()).replace("$", r"\$"), fontsize=12)
        axes = figure.subplots(lines, columns, squeeze=False).flat
        for axis in axes:
            axis.axis("off")
        axes = iter(figure.axes)
        next_axis = next(axes)
        next_axis.imshow(np.concatenate(list(images), axis=1))
        next_axis.set_title("the image", fontsize=10, color="grey")
        height, width = images.shape[1:3]
        for (look, number), axis in zip(cells, axes, strict=False):
            heat = look.maps[number] / max(look.maps.max(), 1e-12)
            grey = images[number].mean(axis=-1)
            axis.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
            axis.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.65, extent=(0, width, height, 0), interpolation="nearest")
            axis.set_title(f"{look.text.strip() or '␣'}".replace("$", r"\$"), fontsize=13)
            axis.text(0.5, -0.02, f"{look.share:.0%} on images", transform=axis.transAxes, ha="center", va="top", fontsize=8)
        figure.savefig(path, dpi=130)


@errors_in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", help="what to ask")
    parser.add_argument("--model", required=True, help="folder or Hub id of a saved model")
    parser.add_argument("--image", action="append", required=True, help="path or URL of an image; may be given several times")
    parser.add_argument("--layer", type=int, help="of the decoder, from 0; -1 is the last (default: the mean of all)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("attention.png"), help="image file to write (default: %(default)s)")
    arguments = parser.parse_args()

    if arguments.output.suffix.lower() != ".png" or arguments.output.is_dir():
        parser.error(f"--output {arguments.output}: expected the name of a PNG file")

    if importlib.util.find_spec("matplotlib") is None:
        parser.exit(2, 'attention_map.py: error: this script needs matplotlib: pip install -e ".[train]"\n')
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    model, processor = load_model(arguments.model, attn_implementation="eager")
    content = [*[{"type": "image"}] * len(arguments.image), {"type": "text", "text": "\n" + arguments.question}]
    inputs = encode_questions(processor, [[{"role": "user", "content": content}]], [arguments.image]).to(model.device)
    looks = attention_maps(model, processor, inputs, arguments.max_new_tokens, arguments.layer)
    if not looks:
        parser.exit(1, "The answer is empty: there is nothing to draw.\n")
    draw_looks(looks, images_as_encoded(processor, inputs["pixel_values"]), arguments.question, arguments.output)
    print("".join(look.text for look in looks).strip())
    print(f"Look at {arguments.output}.")


if __name__ == "__main__":
    main()
