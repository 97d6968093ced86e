"""What people look at: a sheet of held-out images with the model's answers, and the model card with the curves."""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import TrainerCallback

from ..chat import answer_questions, encode_questions
from ..configuration_minimind_v import IMAGE_PLACEHOLDER
from ..data.images import read_image
from ..files import write_file
from ..model_card import model_card, table
from ..processing_minimind_v import MiniMindVProcessor
from .freezing import parameter_table


class SampleSheet(TrainerCallback):
    """At each evaluation, has the model answer held-out rows, and draws them with their images into `samples/`.

    Needs matplotlib, from the extra `train`.

    Args:
        rows: as `load_conversations` gives them; those that end with a question and the right answer are taken.
        processor: of the model.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], processor: MiniMindVProcessor):
        self.rows = [row for row in rows if [turn["role"] for turn in row["conversations"][-2:]] == ["user", "assistant"]]
        self.processor = processor

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if not self.rows:
            return
        images = [[read_image(source) for source in row["images"]] for row in self.rows]
        prompts = encode_questions(self.processor, [row["conversations"][:-1] for row in self.rows], images)
        # In every process: where weights are sharded, a layer waits for all of them
        answers = answer_questions(model, self.processor, prompts)
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            self._draw(images, answers, folder / f"step-{state.global_step:06d}.png")

    def _draw(self, images: list[list[Image.Image]], answers: list[str], path: Path) -> None:
        from ..drawing import Panel, draw_sheet, shorten  # matplotlib is optional

        panels = []
        for row, own, answer in zip(self.rows, images, answers, strict=True):
            *_, question, right = (message["content"].replace(IMAGE_PLACEHOLDER, "") for message in row["conversations"])
            question, answer, right = (
                textwrap.fill(f"{name} {shorten(text, 90)}", 36 if text.isascii() else 20)
                for name, text in (("?", question), ("model:", answer), ("right:", right))
            )
            panels.append(Panel(own[0] if own else None, question, f"{answer}\n{right}"))
        draw_sheet(panels, path, columns=4, width=2.9, fontsize=8)


def write_model_card(trainer: Any) -> None:
    """Write `README.md` and `curves.png` into the output folder of a `MiniMindVTrainer`."""
    from ..drawing import draw_curves  # matplotlib is optional

    args, state, folder = trainer.args, trainer.state, Path(trainer.args.output_dir)
    draw_curves(state.log_history, folder / "curves.png")
    model = trainer.bare_model()
    last = {name: value for entry in state.log_history for name, value in entry.items()}
    optimizer = "Muon, and AdamW for what is no matrix" if trainer.muon else args.optim.value
    recipe = {
        "started from": f"`{trainer.start}`" if trainer.start else "fresh weights",
        "steps, epochs": f"{state.global_step}, {last.get('epoch', 0):.3g}",
        "samples in a step": trainer.global_batch_size(),
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value} {args.lr_scheduler_kwargs or ''}",
        "learning rate of the encoder": f"{trainer.encoder_learning_rate:g}" if trainer.muon else None,
        "optimiser": f"{optimizer}, weight decay {args.weight_decay:g}, gradient norm at most {args.max_grad_norm:g}",
        "precision": {"bf16": "bfloat16", "fp16": "float16"}.get(args.mixed_precision, "float32"),
        "augmentation": trainer.augmentation.strength or None,
        "turns": "each sees the image and itself alone" if getattr(trainer.data_collator, "independent_turns", False) else None,
        "seed": args.seed,
    }
    results = {
        "training loss": f"{last['loss']:.4f}" if "loss" in last else None,
        "loss on held-out data": f"{last['eval_loss']:.4f}" if "eval_loss" in last else None,
        "training time": f"{trainer.train_seconds:.0f} s" if trainer.train_seconds else None,
    }
    data = [f"{name}:\n\n```\n{counts}\n```" for name, counts in trainer.data_counts.items()]
    images = ["![Loss and learning rate by step](curves.png)"]
    if sheets := sorted((folder / "samples").glob("step-*.png")):
        images.append(f"![Answers to held-out questions](samples/{sheets[-1].name})")
    sections = {
        "Recipe": f"{table(item for item in recipe.items() if item[1] is not None)}\n\n```\n{parameter_table(model)}\n```",
        "Data": "\n\n".join(data) or "Not recorded.",
        "Results": "\n\n".join([table((name, value) for name, value in results.items() if value), *images]),
    }
    summary = (
        "A [MiniMind-V](https://github.com/jingyaogong/minimind-v) vision-language model. The folder holds everything: "
        "encoder, projector, decoder, tokenizer, chat template and code."
    )
    write_file(folder / "README.md", model_card(args.hub_model_id or args.output_dir, model, summary, sections))
