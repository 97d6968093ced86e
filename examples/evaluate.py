"""Ask a saved model every question of a data set, in batches, and measure its answers.

    python examples/evaluate.py --model runs/quickstart/model --data runs/quickstart/data/test.jsonl \\
        --images runs/quickstart/data/images --output answers.jsonl

The data set is one that training could read; the last message of each row is the right answer. What is measured:

* exact: the answer is the right one, letter by letter. In brackets, where the true share lies with 95% confidence (Wilson).
* text-only: the same, when the questions are asked without their images. What is right then, the questions give away; what
  exceeds it was seen. (To a blank image a model that sees may say rightly that nothing is there, which would tell less.)
* commonest: always the commonest right answer to questions of the same kind and language.
* token F1: the harmonic mean of precision and recall over words, or over characters in Chinese, without regard to case and
  punctuation; the mean over the questions.
* BLEU: of all answers together, by sacrebleu, with its Chinese tokenisation where the right answers have Chinese. Answers
  shorter than four words are judged by the n-grams that they can have (effective order).
* choice: of a row's `"choices": ["A", "B", ...]`, the likeliest is the right one. The likelihood is that of the whole answer
  with its end, so that long and short ones compete fairly.

A row's "kind", if it has one, groups the table. Rows with `"contents": ["cat", "dog", ...]`, the names of what their image
shows, bring further questions in the manner of POPE: is there a cat? Yes is right as often as no; "all" does not count them. A
second table has accuracy, precision, recall, F1 and the share of yes for all questions with such right answers.

A run that was cut short goes on where it stopped when it is started again. The wrong answers are drawn beside the output file.
BLEU needs sacrebleu, and the sheet matplotlib.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minimind_v_hf.arguments_minimind_v import CACHE
from minimind_v_hf.chat import PRECISIONS, answer_questions, encode_questions, load_model
from minimind_v_hf.configuration_minimind_v import IMAGE_PLACEHOLDER
from minimind_v_hf.data import read_conversations
from minimind_v_hf.data.images import file_state, read_image
from minimind_v_hf.files import write_file
from minimind_v_hf.measures import (
    HAN,
    choices_problem,
    commonest_right,
    corpus_bleu,
    presence_questions,
    right_answer,
    token_f1,
    wilson_interval,
    yes_no_scores,
)
from minimind_v_hf.scripts import errors_in_one_line


# ── Measures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def choice_scores(model, processor, inputs: dict[str, torch.Tensor], choices: list[list[str]]) -> list[list[float]]:
    """The log-likelihood of each choice, with the end token after it, as the answer to each prompt.

    Images and prompts are read once; the choices go on from their cache.

    Args:
        inputs: prompts padded on the left, as the processor gives them.
        choices: those of each prompt; prompts may have different numbers of them.
    """
    tokenizer = processor.tokenizer
    outputs = model(**inputs, use_cache=True, logits_to_keep=1)
    first, cache = outputs.logits[:, -1:].float().log_softmax(-1), getattr(outputs, CACHE)
    scores: list[list[float]] = [[] for _ in choices]
    for number in range(max(map(len, choices))):
        texts = [given[number] if number < len(given) else "" for given in choices]
        ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids], device=first.device)
        log_probabilities = first
        if longest > 1:
            mask = torch.cat((inputs["attention_mask"], torch.ones_like(padded[:, 1:])), dim=1)
            later = model(padded[:, :-1], attention_mask=mask, use_cache=True, **{CACHE: cache}).logits
            log_probabilities = torch.cat((first, later.float().log_softmax(-1)), dim=1)
            cache.crop(1 - longest)  # back to the prompts
        taken = log_probabilities.gather(2, padded[..., None])[..., 0]
        for row, (given, tokens) in enumerate(zip(choices, ids, strict=True)):
            if number < len(given):
                scores[row].append(taken[row, : len(tokens)].sum().item())
    return scores


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_questions(data: Path, image_folder: Path) -> tuple[list[dict[str, Any]], list[list[str] | list[bytes]]]:
    """The rows of a data set, with strings as contents and without "presence"; and the images of each.

    Raises:
        ValueError: training would refuse or mend a row, or it is no question with a right answer; the message names the line.
    """
    rows, images = [], []
    for where, raw, parsed in tqdm(read_conversations(data, image_folder), desc="Reading", unit="row", delay=2):
        row = {**raw, "conversations": parsed.conversations}
        row.pop("presence", None)  # by which rows of `ask_presence` are known
        if problem := find_problem(row, parsed.images):
            raise ValueError(f"{where}: {problem}")
        rows.append(row)
        images.append(parsed.images)
    return rows, images


def find_problem(row: dict[str, Any], images: list) -> str | None:
    """Why a conversation is no question with a right answer, if it is none."""
    messages, contents = row["conversations"], row.get("contents")
    if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
        return "expected a question, and last the assistant's right answer"
    right = messages[-1]["content"]
    if IMAGE_PLACEHOLDER in right:
        return f"the right answer has an {IMAGE_PLACEHOLDER}"
    if problem := choices_problem(row):
        return problem
    if contents is not None and not (isinstance(contents, list) and all(isinstance(name, str) and name for name in contents)):
        return f"expected a list of names as contents, got {contents!r}"
    if contents is not None and not images:
        return "it has contents, but no image that shows them"
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, TypeError) as error:  # half a surrogate pair, or bytes of a Parquet file
        return f"the row cannot be written as JSON ({error})"
    return None


def ask_presence(rows: list[dict[str, Any]], images: list[list], question: str) -> tuple[list[dict[str, Any]], list[list]]:
    """Rows that ask of the images with known contents whether a thing is there, and their images.

    Args:
        question: with {} for the name of the thing.
    """
    known = {tuple(images[number]): number for number, row in enumerate(rows) if row.get("contents") is not None}
    numbers = list(known.values())  # of one row for each image
    yes, no = ("有", "没有") if re.search(f"[{HAN}]", question) else ("yes", "no")
    asked, shown = [], []
    for index, name, there in presence_questions([rows[number]["contents"] for number in numbers]):
        row, sources = rows[numbers[index]], images[numbers[index]]
        content = f"{IMAGE_PLACEHOLDER * len(sources)}\n{question.replace('{}', name)}"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": yes if there else no}]
        asked.append({**row, "conversations": messages, "choices": None, "kind": "presence", "presence": name})
        shown.append(sources)
    return asked, shown


def finished_rows(unfinished: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers that an interrupted run of the same settings left, and a file that ends with them."""
    done = []
    if unfinished.exists():
        with open(unfinished, encoding="utf-8") as file:  # splitlines() would also split at separators within a text
            lines = list(file)
        if lines and lines[0] == json.dumps(settings) + "\n":
            done = [json.loads(line) for line in lines[1:] if line.endswith("\n")]  # the last may be half a line
            print(f"{len(done)} of {len(rows)} questions were answered before.", file=sys.stderr)
        else:
            print(f"{unfinished} is of another model, data set, images or length: starting anew.", file=sys.stderr)
    rest = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done)
    unfinished.write_text(json.dumps(settings) + "\n" + rest, encoding="utf-8")
    return done


def fingerprint(*sources: str | Path) -> str:
    """Tells files, and the files of folders, from what they are after a change."""
    files = [file for source in sources for file in (sorted(Path(source).rglob("*")) if Path(source).is_dir() else [source])]
    return hashlib.sha256(repr([(str(file), file_state(str(file))) for file in files]).encode()).hexdigest()


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def answer(model, processor, batch: list[dict[str, Any]], sources: list[list], max_new_tokens: int) -> list[dict[str, Any]]:
    """The rows with "answer" and its measures.

    Those with images also have "answer_text_only", without them; those with choices "choice" and "choice_right".
    """
    images = [[read_image(source) for source in row] for row in sources]
    inputs = encode_questions(processor, [row["conversations"][:-1] for row in batch], images).to(model.device)
    results = []
    for row, text in zip(batch, answer_questions(model, processor, inputs, max_new_tokens=max_new_tokens), strict=True):
        right = right_answer(row)
        results.append({**row, "answer": text, "right": text == right, "f1": token_f1(text, right)})
    if seen := [row for row, shown in zip(results, images, strict=True) if shown]:
        questions = [
            [{**message, "content": message["content"].replace(IMAGE_PLACEHOLDER, "").strip()} for message in messages]
            for messages in (row["conversations"][:-1] for row in seen)
        ]
        alone = encode_questions(processor, questions, [[]] * len(seen)).to(model.device)
        for row, text in zip(seen, answer_questions(model, processor, alone, max_new_tokens=max_new_tokens), strict=True):
            row |= {"answer_text_only": text, "right_text_only": text == right_answer(row)}
    choices = [row.get("choices") or [] for row in batch]
    if any(choices):
        for row, scores in zip(results, choice_scores(model, processor, inputs, choices), strict=True):
            if scores:
                row["choice"] = row["choices"][scores.index(max(scores))]
                row["choice_right"] = row["choice"] == row["conversations"][-1]["content"]
    return results


def share(right: int, asked: int) -> str:
    """A share and its confidence interval, in percent."""
    low, high = wilson_interval(right, asked)
    return f"{right / asked:.1%} ({100 * low:.1f}–{100 * high:.1f})"


def table(rows: list[dict[str, Any]]) -> str:
    """The measures of each kind of question, of each language, and of all that the data set asks."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: str(row.get("kind") or "")):
        if row.get("kind"):
            groups.setdefault(str(row["kind"]), []).append(row)
    own = [row for row in rows if "presence" not in row]
    chinese, other = ([row for row in own if bool(re.search(f"[{HAN}]", right_answer(row))) is han] for han in (True, False))
    if chinese and other:
        groups |= {"in Chinese": chinese, "in other languages": other}
    groups["all"] = own
    lines = [
        f"{'questions':<19}{'asked':>6}{'exact (95%)':>21}{'text-only (95%)':>21}{'commonest':>11}"
        f"{'token F1':>10}{'BLEU':>7}{'choice':>8}"
    ]
    yes_no_lines = [
        f"{'yes or no':<19}{'asked':>6}{'accuracy (95%)':>21}{'precision':>11}{'recall':>8}{'F1':>8}{'yes':>8}{'neither':>9}"
    ]
    for name, group in groups.items():
        answers, right = [row["answer"] for row in group], [right_answer(row) for row in group]
        exact, f1 = share(sum(row["right"] for row in group), len(group)), sum(row["f1"] for row in group) / len(group)
        alone = [row["right_text_only"] for row in group if "right_text_only" in row]
        text_only = share(sum(alone), len(alone)) if alone else "–"
        bleu = corpus_bleu(answers, right)
        score = "–" if bleu is None else f"{bleu:.1f}"
        chosen = [row["choice_right"] for row in group if "choice_right" in row]
        choice = f"{sum(chosen) / len(chosen):.1%}" if chosen else "–"
        lines.append(
            f"{name:<19}{len(group):>6}{exact:>21}{text_only:>21}{commonest_right(group) / len(group):>11.1%}"
            f"{f1:>10.1%}{score:>7}{choice:>8}"
        )
        if scores := yes_no_scores(zip(answers, right, strict=True)):
            yes_no_lines.append(
                f"{name:<19}{scores.asked:>6}{share(scores.right, scores.asked):>21}{scores.precision:>11.1%}"
                f"{scores.recall:>8.1%}{scores.f1:>8.1%}{scores.yes:>8.1%}{scores.neither:>9}"
            )
    if bleu is None:
        lines.append("BLEU needs sacrebleu: pip install sacrebleu")
    return "\n".join([*lines, *(["", *yes_no_lines] if yes_no_lines[1:] else [])])


@errors_in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a saved model")
    parser.add_argument("--data", required=True, type=Path, help="JSONL or Parquet file with the questions and right answers")
    parser.add_argument("--images", required=True, type=Path, help="folder or zip archive that holds the images")
    parser.add_argument(
        "--presence",
        default="Is there a {} in the image?",
        help="question about a row's contents, in words that the model knows (default: %(default)s)",
    )
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write, one line per question")
    parser.add_argument("--batch-size", type=int, default=50, help="questions at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of the weights, to see what less costs (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.batch_size < 1 or arguments.max_new_tokens < 1:
        parser.error("--batch-size and --max-new-tokens: expected 1 or more")
    if "{}" not in arguments.presence:
        parser.error(f"--presence: expected a question with {{}} for the name, got {arguments.presence!r}")
    if not arguments.data.is_file() or not arguments.images.exists():
        parser.error(f"expected a file and a folder: --data {arguments.data} --images {arguments.images}")
    if arguments.output.is_dir() or (arguments.output.exists() and arguments.output.samefile(arguments.data)):
        parser.error(f"--output {arguments.output}: expected the name of a new file")

    # ── Questions and model ──
    rows, images = read_questions(arguments.data, arguments.images)
    for old, new in zip((rows, images), ask_presence(rows, images, arguments.presence), strict=True):
        old += new
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    model, processor = load_model(arguments.model, arguments.precision)

    # ── Answers ──
    settings = {"model": fingerprint(Path(arguments.model)), "data": fingerprint(arguments.data)}
    settings["images"] = fingerprint(*(source for row in images for source in row if isinstance(source, str)))
    settings |= {"length": arguments.max_new_tokens, "precision": arguments.precision, "presence": arguments.presence}
    unfinished = arguments.output.with_name(arguments.output.name + ".part")
    done = finished_rows(unfinished, settings, rows)
    with (
        open(unfinished, "a", encoding="utf-8") as file,
        tqdm(total=len(rows), initial=len(done), desc="Answering", unit="question") as progress,
    ):
        for start in range(len(done), len(rows), arguments.batch_size):
            batch = rows[start : start + arguments.batch_size]
            results = answer(model, processor, batch, images[start : start + arguments.batch_size], arguments.max_new_tokens)
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in results))
            file.flush()
            done += results
            progress.update(len(batch))
    write_file(arguments.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done))
    unfinished.unlink()

    # ── What came out ──
    print(table(done))
    own = [row["right"] for row in done if "presence" not in row]
    print(f"{sum(own)} of {len(own)} answers are exact ({sum(own) / len(own):.1%}). They are in {arguments.output}.")
    sheet = arguments.output.with_name(f"{arguments.output.stem}_errors.png")
    sheet.unlink(missing_ok=True)
    wrong = [(row, sources[0]) for row, sources in zip(done, images, strict=True) if sources and not row["right"]]
    if wrong:
        try:
            from minimind_v_hf.drawing import draw_answers
        except ImportError:
            print("A sheet of the wrong answers needs matplotlib: pip install matplotlib")
        else:
            draw_answers(wrong, sheet)
            print(f"Wrong answers are drawn in {sheet}.")


if __name__ == "__main__":
    main()
