"""What people look at: a sheet of held-out pictures with the model's answers, the curves, and the model card.

Drawing needs matplotlib, from the extra `train`.
"""

import textwrap
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainerCallback
from transformers.utils import logging

from ..configuration_minimind_v import IMAGE_PLACEHOLDER
from ..data.images import read_image
from ..processing_minimind_v import MiniMindVProcessor
from .freezing import parameter_table


logger = logging.get_logger(__name__)


# Whichever of these is installed, so that Chinese can be read
_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
)


def _fonts() -> list[str]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in (*_FONTS, "DejaVu Sans") if name in installed]


# ── Answers to held-out questions ────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def answer(model, processor: MiniMindVProcessor, rows: list[dict[str, Any]], max_new_tokens: int = 64) -> list[str]:
    """What the model answers, greedily, where a conversation's last message stands.

    Args:
        model: in any mode, which it keeps.
        processor: of the model.
        rows: with `conversations`, and `images` as `read_image` takes them.
        max_new_tokens: longest answer.
    """
    prompts = processor.apply_chat_template([row["conversations"][:-1] for row in rows], add_generation_prompt=True)
    images = [[read_image(source) for source in row["images"]] for row in rows]
    inputs = processor(text=prompts, images=images if any(images) else None, padding=True, return_tensors="pt")
    training = model.training
    model.eval()
    try:
        output = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
    finally:
        model.train(training)
    return [
        text.strip() for text in processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def draw_answers(rows: list[dict[str, Any]], answers: list[str], path: Path, columns: int = 4) -> None:
    """Draw a sheet of pictures, each under its question and over the model's answer and the right one, as a PNG file."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def shorten(text: str, label: str) -> str:
        text = "".join(character if character.isprintable() else " " for character in text)
        return textwrap.fill(f"{label} {textwrap.shorten(text, 120, placeholder=' …')}", 34)

    lines = -(-len(rows) // columns)
    with rc_context({"font.family": _fonts()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(columns * 2.8, lines * 3.6), layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axis in axes:
            axis.axis("off")
        for axis, row, given in zip(axes, rows, answers, strict=False):
            if row["images"]:
                axis.imshow(read_image(row["images"][0]))
            *_, question, right = (message["content"] for message in row["conversations"])
            question = question.replace(IMAGE_PLACEHOLDER, "").strip()
            axis.set_title(shorten(question, "?"), fontsize=8, loc="left", parse_math=False)
            text = f"{shorten(given, 'model:')}\n{shorten(right, 'right:')}"
            axis.text(0, -0.03, text, transform=axis.transAxes, va="top", fontsize=8, parse_math=False)
        FigureCanvasAgg(figure).print_png(str(path))


class SampleSheet(TrainerCallback):
    """At each evaluation, has the model answer held-out rows, and draws them with their pictures into `samples/`.

    Args:
        rows: as `load_conversations` gives them; those that end with a question and the right answer are taken.
        processor: of the model.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], processor: MiniMindVProcessor):
        self.rows = [row for row in rows if [turn["role"] for turn in row["conversations"][-2:]] == ["user", "assistant"]]
        self.processor = processor

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if args.fsdp or type(model).__name__.startswith(("FSDP", "FullyShardedDataParallel")):
            logger.warning_once("No samples are drawn: FSDP shards the model that would answer.")
        elif state.is_world_process_zero and self.rows:
            folder = Path(args.output_dir) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            answers = answer(model, self.processor, self.rows)
            draw_answers(self.rows, answers, folder / f"step-{state.global_step:06d}.png")


# ── The curves and the model card ────────────────────────────────────────────────────────────────────────────────────


def draw_curves(history: list[dict[str, float]], path: Path) -> None:
    """Draw loss and learning rate by step as a PNG file, from `trainer.state.log_history`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    losses, rates = figure.subplots(1, 2)
    for axis, name, label in ((losses, "loss", "training"), (losses, "eval_loss", "held out"), (rates, "learning_rate", None)):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 20 else None)
    losses.set(xlabel="step", ylabel="loss")
    rates.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    if losses.lines:
        losses.legend()
    for axis in (losses, rates):
        axis.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))


_CARD = """\
# {title}

A [MiniMind-V](https://github.com/jingyaogong/minimind-v) vision-language model. The folder holds everything: encoder,
projector, decoder, tokenizer, chat template and code.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
```

## Recipe

{recipe}

```
{parameters}
```

## Data

{data}

## Results

{results}

![Loss and learning rate by step](curves.png)
{sheet}"""


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else "Not recorded."


def write_model_card(trainer: Any) -> None:
    """Write `README.md` and `curves.png` into the output folder of a `MiniMindVTrainer`."""
    args, state, folder = trainer.args, trainer.state, Path(trainer.args.output_dir)
    draw_curves(state.log_history, folder / "curves.png")
    last = {name: value for entry in state.log_history for name, value in entry.items()}
    recipe = {
        "started from": f"`{trainer.start}`" if trainer.start else "fresh weights",
        "steps, epochs": f"{state.global_step}, {last.get('epoch', 0):.3g}",
        "samples in a step": trainer._global_batch_size(),
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value} {args.lr_scheduler_kwargs or ''}",
        "optimiser": f"{args.optim.value}, weight decay {args.weight_decay:g}, gradient norm at most {args.max_grad_norm:g}",
        "precision": {"bf16": "bfloat16", "fp16": "float16"}.get(args.mixed_precision, "float32"),
        "seed": args.seed,
    }
    results = {
        "training loss": f"{last['loss']:.4f}" if "loss" in last else None,
        "loss on held-out data": f"{last['eval_loss']:.4f}" if "eval_loss" in last else None,
        "training time": f"{trainer.train_seconds:.0f} s" if trainer.train_seconds else None,
    }
    sheets = sorted((folder / "samples").glob("step-*.png"))
    content = _CARD.format(
        title=folder.resolve().name,
        name=args.hub_model_id or args.output_dir,
        recipe=_table(recipe),
        parameters=parameter_table(trainer._bare_model()),
        data="\n\n".join(f"{name}:\n\n```\n{counts}\n```" for name, counts in trainer.data_counts.items()) or "Not recorded.",
        results=_table(results),
        sheet=f"\n![Answers to held-out questions](samples/{sheets[-1].name})\n" if sheets else "",
    )
    data = ModelCardData(library_name="transformers", pipeline_tag="image-text-to-text", tags=["minimind-v", "vision"])
    unfinished = folder / "README.md.part"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{content}").save(unfinished)
    unfinished.replace(folder / "README.md")
