"""The pictures that the examples draw: held-out questions with their answers, and the loss."""

import itertools
import math
import random
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from transformers.image_utils import load_image


matplotlib.use("agg")

# Whichever of these is installed, so that Chinese questions can be read
CHINESE_FONTS = [
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Heiti SC",
    "SimHei",
    "Arial Unicode MS",
]
RIGHT, WRONG = "#2ca02c", "#d62728"


def chinese_font() -> str | None:
    """The name of an installed font with Chinese glyphs, or None."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in CHINESE_FONTS if name in installed), None)


def draw_answers(rows: list[dict[str, Any]], image_folder: Path, path: Path, columns: int = 6, lines: int = 4) -> None:
    """Draw a sheet of pictures, each with question, answer, and right or wrong.

    Args:
        rows: as `evaluate.py` writes them; of several pictures the first is drawn, and of several questions the last.
        image_folder: where the pictures are.
        path: the PNG file to write.
        columns: pictures side by side.
        lines: pictures one below the other, at most.
    """
    font = chinese_font()
    if font is None and not all(_question(row).isascii() for row in rows):
        print("No font with Chinese glyphs was found (install Noto Sans CJK, say): the sheet shows English questions only.")
        rows = [row for row in rows if _question(row).isascii()]
    # As many right and wrong ones as there are: a fair sample
    rows = random.Random(0).sample(rows, min(len(rows), columns * lines))
    lines = max(1, math.ceil(len(rows) / columns))
    with matplotlib.rc_context({"font.family": [name for name in (font, "DejaVu Sans") if name]}):
        figure = Figure(figsize=(columns * 2.3, lines * 2.75), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.08, hspace=0.06)
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis, row in itertools.zip_longest(axes.flat, rows):
            axis.set_xticks([])
            axis.set_yticks([])
            if row is None:
                axis.axis("off")
                continue
            colour = RIGHT if row["right"] else WRONG
            axis.imshow(load_image(str(image_folder / row["image"].split(",")[0].strip())))
            axis.set_title(wrap(_shorten(_question(row))), fontsize=9)
            answer, right = (_shorten(text) for text in (row["answer"], row["conversations"][-1]["content"]))
            verdict = answer if row["right"] else f"{answer} (not {right})"
            axis.set_xlabel(wrap(("✓ " if row["right"] else "✗ ") + verdict, 26), color=colour, fontsize=11)
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=3)
        figure.savefig(path, dpi=110)


def _question(row: dict[str, Any]) -> str:
    return row["conversations"][-2]["content"].replace("<image>", "").strip()


def _shorten(text: str, length: int = 48) -> str:
    text = " ".join(text.split()).replace("$", r"\$")  # which would begin a formula
    return text if len(text) <= length else text[:length] + "…"


def wrap(text: str, width: int = 24) -> str:
    """Break a line near the middle if it is too long for a picture's width."""
    if len(text) <= width or " " not in text:
        return text
    spaces = [i for i, character in enumerate(text) if character == " "]
    middle = min(spaces, key=lambda i: abs(i - len(text) / 2))
    return f"{text[:middle]}\n{text[middle + 1 :]}"


def draw_loss(points: list[tuple[int, float]], path: Path) -> None:
    """Draw the training loss by step as a PNG file."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*points, strict=True), color="#1f5fd0")
    axis.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
