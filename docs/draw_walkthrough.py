"""Draw the images of docs/walkthrough.md, from the model and the data of the first run.

    python docs/draw_walkthrough.py --model runs/quickstart/model --image runs/quickstart/data/images/test-00032.jpg

The images are kept in the repository, so this is run only when they are to change.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin


FOLDER = Path(__file__).parent / "images"
TEXT, IMAGE, LEARNED = "#dfe3ea", "#f6c77d", "#8fd19e"
QUESTION, ANSWER = "Which shape is at the top left?", "cross"
ATTENTION = (
    QUESTION,
    "Where is the blue shape?",
    "What colour is the shape at the bottom right?",
    "How many shapes are there?",
)


def draw_patches(image: Image.Image, path: Path) -> None:
    """An image cut into the patches of the first run's encoder, and of MiniMind2-V's."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    for axis, (size, patch, numbers) in zip(figure.subplots(1, 2), ((64, 16, 11), (224, 16, 5)), strict=True):
        side = size // patch
        axis.imshow(image.resize((size, size)), extent=(0, size, size, 0))
        axis.set_xticks(range(0, size + 1, patch), labels=[])
        axis.set_yticks(range(0, size + 1, patch), labels=[])
        axis.grid(color="black", linewidth=0.8)
        axis.tick_params(length=0)
        axis.set_title(f"{size} x {size} pixels, {side} x {side} patches: {side**2} image tokens", fontsize=11)
        for number in range(side**2):
            row, column = divmod(number, side)
            axis.text(column * patch + patch * 0.06, row * patch + patch * 0.06, number, fontsize=numbers, va="top")
    figure.savefig(path, dpi=110)


def draw_prompt(processor: ProcessorMixin, path: Path) -> None:
    """One conversation as tokens: with the placeholder, and as the model reads it, with the learned tokens in colour."""
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\n" + QUESTION}]},
        {"role": "assistant", "content": ANSWER},
    ]
    encoded = processor.tokenizer.apply_chat_template(
        conversation,
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    before = list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))
    is_image = [token == processor.image_token_id for token, _ in before]
    after = [
        pair
        for pair, image in zip(before, is_image, strict=True)
        for pair in [pair] * (processor.image_seq_length if image else 1)
    ]

    figure = Figure(figsize=(11, 4.3), layout="constrained")
    axis = figure.subplots()
    line = 0
    for title, tokens in (
        (f"the prompt: {len(before)} tokens", before),
        (f"as the model reads it: {len(after)} tokens", after),
    ):
        axis.text(0, line + 0.25, title, fontsize=11, weight="bold", va="center")
        line, x = line + 1, 0.0
        for token, learned in tokens:
            text = processor.tokenizer.decode([token]).replace("\n", "↵")
            width = 0.24 + 0.105 * len(text)
            if x + width > 11:
                line, x = line + 1, 0.0
            colour = LEARNED if learned else IMAGE if token == processor.image_token_id else TEXT
            axis.add_patch(
                FancyBboxPatch((x + 0.05, line - 0.15), width - 0.12, 0.7, boxstyle="round,pad=0.02", fc=colour, ec="grey")
            )
            axis.text(x + width / 2, line + 0.2, text, fontsize=8.5, ha="center", va="center", family="monospace")
            x += width
        line += 1.4
    for x, (colour, meaning) in zip(
        (0, 3.2, 6.8),
        ((TEXT, "read: label -100"), (IMAGE, "image token: label -100"), (LEARNED, "learned: label = the token")),
        strict=True,
    ):
        axis.add_patch(FancyBboxPatch((x + 0.05, line - 0.15), 0.4, 0.5, boxstyle="round,pad=0.02", fc=colour, ec="grey"))
        axis.text(x + 0.6, line + 0.1, meaning, fontsize=10, va="center")
    axis.set(xlim=(0, 11.1), ylim=(line + 0.6, -0.3))
    axis.axis("off")
    figure.savefig(path, dpi=110)


def draw_attention(model: str, image: str, path: Path) -> None:
    """Attention maps of several questions about one image, in two columns."""
    script = Path(__file__).parent.parent / "examples" / "attention_map.py"
    sheets = []
    with tempfile.TemporaryDirectory() as folder:
        for number, question in enumerate(ATTENTION):
            output = Path(folder) / f"{number}.png"
            subprocess.run(
                [sys.executable, script, "--model", model, "--image", image, "--output", output, question], check=True
            )
            sheets.append(Image.open(output).convert("RGB"))
    width, height = max(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets)
    both = Image.new("RGB", (2 * width, (len(sheets) + 1) // 2 * height), "white")
    for number, sheet in enumerate(sheets):
        both.paste(sheet, (number % 2 * width, number // 2 * height))
    both.quantize(128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="runs/quickstart/model", help="folder of the first run's model (default: %(default)s)"
    )
    parser.add_argument(
        "--image", default="runs/quickstart/data/images/test-00032.jpg", help="image to ask about (default: %(default)s)"
    )
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    draw_patches(Image.open(arguments.image), FOLDER / "walkthrough_patches.png")
    draw_prompt(AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True), FOLDER / "walkthrough_prompt.png")
    draw_attention(arguments.model, arguments.image, FOLDER / "walkthrough_attention.png")


if __name__ == "__main__":
    main()
