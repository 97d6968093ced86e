"""What training by reward and by preference needs beside TRL's trainers: single questions, and SFT to compare with.

rows = read_questions(["train.jsonl"], "images", "How many")
data = prompts(rows)                      # as TRL's trainers take it
imitate(model, processor, rows, 60, ...)  # plain SFT on the right answers, for a minute
ask(model, processor, rows)               # the rows with the model's answers
"""

import argparse
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from ..chat import answer_questions, encode_questions
from ..configuration_minimind_v import IMAGE_PLACEHOLDER
from ..data import MiniMindVCollator, read_conversations, tokenize_conversations
from ..data.images import read_image
from ..measures import choices_problem, right_answer, wilson_interval, yes_no_scores
from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from ..processing_minimind_v import MiniMindVProcessor
from .arguments import RunArguments
from .loading import load_start


def read_questions(
    data_files: Iterable[str | os.PathLike], image_folder: str | os.PathLike, questions: str = ""
) -> list[dict[str, Any]]:
    """Each answer of the assistant as the end of a conversation of its own, with the turns before it.

    Args:
        data_files: as `read_conversations` takes them; their answers are the right ones.
        image_folder: the folder or zip archive that names of images are relative to.
        questions: a regular expression; those questions are taken that it is found in.

    Returns:
        `conversations`, `images`, and `choices` where the row has them, which then belong to its last answer.

    Raises:
        ValueError: a row cannot be understood, its right answer is not among its choices, `questions` is no regular
            expression, or no question is left.
    """
    try:
        pattern = re.compile(questions)
    except re.error as error:
        raise ValueError(f"questions={questions!r}: expected a regular expression ({error}).") from error
    rows = []
    for file in data_files:
        for where, raw, row in read_conversations(file, image_folder):
            messages = row.conversations
            for end in range(2, len(messages) + 1):
                if messages[end - 1]["role"] != "assistant" or not pattern.search(messages[end - 2]["content"]):
                    continue
                choices = raw.get("choices") if end == len(messages) else None
                images = row.images[: sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages[:end])]
                rows.append({"conversations": messages[:end], "images": images, "choices": choices})
                if problem := choices_problem(rows[-1]):
                    raise ValueError(f"{where}: {problem}.")
    if not rows:
        raise ValueError(f"{', '.join(map(str, data_files))}: there is no answered question in which {questions!r} is found.")
    return rows


def load(folder: str, args: TrainingArguments) -> tuple[MiniMindVForConditionalGeneration, MiniMindVProcessor]:
    """The model and the processor to start from, on the device that is trained on; TRL's settings for it in `args`.

    Raises:
        ValueError: there are several processes, of which each would ask and draw for itself, or the folder cannot be loaded.
    """
    if args.world_size > 1:
        raise ValueError(f"Expected one process, got {args.world_size}: start the script with python, without a launcher.")
    model, processor = load_start(RunArguments(model=folder), args)
    if not getattr(model.config.text_config, "num_experts", 0):
        args.router_aux_loss_coef = 0.0  # TRL would look for experts to balance
    return model.to(args.device), processor


def prompts(rows: Iterable[dict[str, Any]], **columns: list) -> Dataset:
    """What TRL's trainers read: `prompt` (messages) and `images` of each row, which are read when they are used.

    TRL would put all images before the text. So the contents are lists, which have each image in its place.

    Args:
        rows: as `read_questions` gives them.
        columns: further ones, such as what a reward function is to know.
    """
    messages = [
        [{"role": message["role"], "content": _items(message["content"])} for message in row["conversations"][:-1]]
        for row in rows
    ]
    data = Dataset.from_dict({"prompt": messages, "images": [row["images"] for row in rows], **columns})

    def read(batch: dict[str, list]) -> dict[str, list]:
        return {**batch, "images": [[read_image(source) for source in images] for images in batch["images"]]}

    return data.with_transform(read)


def _items(text: str) -> list[dict[str, str]]:
    parts = re.split(f"({IMAGE_PLACEHOLDER})", text)
    return [{"type": "image"} if part == IMAGE_PLACEHOLDER else {"type": "text", "text": part} for part in parts if part]


def ask(model, processor, rows: list[dict[str, Any]], batch_size: int = 50) -> list[dict[str, Any]]:
    """The rows with "answer", which is greedy, and "right": whether it is the right one, letter by letter."""
    answered = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        images = [[read_image(source) for source in row["images"]] for row in batch]
        inputs = encode_questions(processor, [row["conversations"][:-1] for row in batch], images)
        answers = answer_questions(model, processor, inputs)
        answered += [
            {**row, "answer": text, "right": text == right_answer(row)} for row, text in zip(batch, answers, strict=True)
        ]
    return answered


class _StopAfter(TrainerCallback):
    """Ends the training after so many seconds, which its progress bar counts, and not steps."""

    def __init__(self, seconds: float):
        self.start, self.bar = time.perf_counter(), tqdm(total=round(seconds), unit="s", desc="Plain SFT")

    def on_step_end(self, args, state, control, **kwargs):
        passed = min(round(time.perf_counter() - self.start), self.bar.total)
        self.bar.update(passed - self.bar.n)
        control.should_training_stop = passed == self.bar.total

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def imitate(model, processor, rows: list[dict[str, Any]], seconds: float, args: TrainingArguments) -> None:
    """Plain SFT on the right answers for so long: what another way of training is to be compared with."""
    data = Dataset.from_list([{"conversations": row["conversations"], "images": row["images"]} for row in rows])
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokenize_conversations(data, processor),
        data_collator=MiniMindVCollator(processor),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_StopAfter(seconds))
    trainer.train()


# ── What the scripts share ───────────────────────────────────────────────────────────────────────────────────────────


def question_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of a script that trains on questions: where it starts from, its data and its output folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of the model to start from")
    parser.add_argument("--data_files", required=True, nargs="+", help="rows with the right answers")
    parser.add_argument("--eval_files", required=True, nargs="+", help="held-out rows")
    parser.add_argument("--image_folder", required=True, help="folder or zip archive that holds the images")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to write")
    return parser


def changes(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str | bytes]]:
    """The questions about images with both answers, "old → new", and the first image of each: what `draw_answers` draws."""
    both = [{**new, "answer": f"{old['answer']} → {new['answer']}"} for old, new in zip(before, after, strict=True)]
    return [(row, row["images"][0]) for row in both if row["images"]]


def summary(name: str, rows: list[dict[str, Any]]) -> str:
    """A line that says how many answers are exact, and how many say yes where that is asked."""
    right = sum(row["right"] for row in rows)
    low, high = wilson_interval(right, len(rows))
    line = f"{name:<24}{right / len(rows):>7.1%} ({100 * low:.1f}–{100 * high:.1f}) of {len(rows)} held-out answers are exact"
    if scores := yes_no_scores((row["answer"], right_answer(row)) for row in rows):
        line += f"; {scores.yes:.1%} say yes, {scores.precision:.1%} of them rightly"
    return line
