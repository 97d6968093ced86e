"""What is drawn of a model: held-out questions with their answers, and the curves of its training. Needs matplotlib."""

import itertools
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from PIL import Image

from .data.images import read_image


try:
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
except ImportError as error:
    raise ImportError('Drawing needs matplotlib: pip install -e ".[train]"') from error


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


def font_names() -> list[str]:
    """The fonts to draw text with, the first that has a glyph first."""
    return [name for name in (chinese_font(), "DejaVu Sans") if name]


@dataclass
class Panel:
    """A part of a sheet: an image, or none, with text above it and below it, and the colour of its frame."""

    image: Image.Image | None
    title: str
    label: str
    colour: str = "black"


def draw_sheet(panels: Sequence[Panel], path: Path, columns: int, width: float = 2.3, fontsize: int = 10) -> None:
    """Draw images with what is asked and answered about them as a PNG file.

    Args:
        panels: one for each image.
        path: the file to write.
        columns: images side by side.
        width: of a panel, in inches.
        fontsize: of what stands below an image, in points.
    """
    lines = max(1, math.ceil(len(panels) / columns))
    with matplotlib.rc_context({"font.family": font_names()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        layout = ConstrainedLayoutEngine(h_pad=0.08, hspace=0.06)
        figure = Figure(figsize=(columns * width, lines * width * 1.2), layout=layout)
        for axis, panel in itertools.zip_longest(figure.subplots(lines, columns, squeeze=False).flat, panels):
            axis.set_xticks([])
            axis.set_yticks([])
            if panel is None:
                axis.axis("off")
                continue
            if panel.image is not None:
                axis.imshow(panel.image)
            axis.set_title(panel.title, fontsize=9, parse_math=False)
            axis.set_xlabel(panel.label, color=panel.colour, fontsize=fontsize, parse_math=False)
            for spine in axis.spines.values():
                spine.set(color=panel.colour, linewidth=3)
        figure.savefig(path, dpi=110, format="png")


def draw_answers(rows: Sequence[tuple[dict[str, Any], Any]], path: Path, columns: int = 6, lines: int = 4) -> None:
    """Draw a sheet of images, each with question, answer, and right or wrong.

    Args:
        rows: as `evaluate.py` writes them, of whose questions the last is drawn; each with its image, as `read_image` takes it.
        path: the PNG file to write.
        columns: images side by side.
        lines: images one below the other, at most.
    """
    if chinese_font() is None and not all(_question(row).isascii() for row, _ in rows):
        print("No font with Chinese glyphs was found (install Noto Sans CJK, say): the sheet shows English questions only.")
        rows = [(row, image) for row, image in rows if _question(row).isascii()]
    panels = []
    # As many right and wrong ones as there are: a fair sample
    for row, image in random.Random(0).sample(rows, min(len(rows), columns * lines)):
        answer, right = (shorten(text) for text in (row["answer"], row["conversations"][-1]["content"]))
        verdict = f"✓ {answer}" if row["right"] else f"✗ {answer} (not {right})"
        colour = RIGHT if row["right"] else WRONG
        panels.append(Panel(read_image(image), fill(shorten(_question(row)), 24), fill(verdict, 26), colour))
    draw_sheet(panels, path, columns)


def _question(row: dict[str, Any]) -> str:
    return row["conversations"][-2]["content"].replace("<image>", "").strip()


def shorten(text: str, length: int = 48) -> str:
    """The text in one line, and at most so long."""
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= length else text[:length] + "…"


def draw_curves(
    history: list[dict[str, float]], path: Path, names: Mapping[str, str] | None = None, ylabel: str = "loss"
) -> None:
    """Draw what training measured, and the learning rate, by step as a PNG file.

    Args:
        history: `trainer.state.log_history`.
        path: the file to write.
        names: of what was measured, each with its label; by default the losses.
        ylabel: what they are.
    """
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    measures, rates = figure.subplots(1, 2)
    names = names or {"loss": "training", "eval_loss": "held out"}
    for axis, name, label in [*((measures, *item) for item in names.items()), (rates, "learning_rate", None)]:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 20 else None)
    measures.set(xlabel="step", ylabel=ylabel)
    rates.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    if measures.lines:
        measures.legend()
    for axis in (measures, rates):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, format="png")
