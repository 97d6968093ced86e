"""Ask a saved model every question of a data set, in batches, and measure its answers.

    python examples/evaluate.py --model runs/quickstart/model --data runs/quickstart/data/test.jsonl \\
        --images runs/quickstart/data/images --output answers.jsonl

The data set is one that training could read; the last message of each row is the right answer. What is measured:

* exact: the answer is the right one, letter by letter.
* token F1: the harmonic mean of precision and recall over words, or over characters in Chinese, without regard to case and
  punctuation; the mean over the questions.
* BLEU: of all answers together, by sacrebleu, with its Chinese tokenisation where the right answers have Chinese. Answers
  shorter than four words are judged by the n-grams that they can have (effective order).
* choice: of a row's `"choices": ["A", "B", ...]`, the likeliest is the right one. The likelihood is that of the whole answer
  with its end, so that long and short ones compete fairly.

A row's "kind", if it has one, groups the table. A run that was cut short goes on where it stopped when it is started again. The
wrong answers are drawn beside the output file. BLEU needs sacrebleu, and the sheet matplotlib.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minimind_v_hf.arguments_minimind_v import CACHE
from minimind_v_hf.chat import answer_questions, encode_questions, load_model
from minimind_v_hf.configuration_minimind_v import IMAGE_PLACEHOLDER
from minimind_v_hf.data import read_conversations
from minimind_v_hf.data.images import file_state, read_image
from minimind_v_hf.files import write_file
from minimind_v_hf.scripts import errors_in_one_line


HAN = "㐀-鿿豈-﫿"
WORD = re.compile(f"[{HAN}]|[^\\W{HAN}]+")  # a Chinese character, or a word of anything else


# ── Measures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def token_f1(answer: str, right: str) -> float:
    """Harmonic mean of precision and recall over words and Chinese characters; 1 where neither text has any."""
    given, wanted = (WORD.findall(text.lower()) for text in (answer, right))
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted)) if given or wanted else 1.0


def corpus_bleu(answers: list[str], right: list[str]) -> float | None:
    """BLEU from 0 to 100; None where sacrebleu is not installed."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return None
    chinese = any(re.search(f"[{HAN}]", text) for text in right)
    return BLEU(tokenize="zh" if chinese else "13a", effective_order=True).corpus_score(answers, [right]).score


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
        texts = [some[number] if number < len(some) else "" for some in choices]
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
        for row, (some, tokens) in enumerate(zip(choices, ids, strict=True)):
            if number < len(some):
                scores[row].append(taken[row, : len(tokens)].sum().item())
    return scores


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_questions(data: Path, image_folder: Path) -> tuple[list[dict[str, Any]], list[list[str] | list[bytes]]]:
    """The rows of a data set, unchanged but for their contents, which are strings; and the images of each.

    Raises:
        ValueError: training would refuse or mend a row, or it is no question with a right answer; the message names the line.
    """
    rows, images = [], []
    for where, raw, parsed in tqdm(read_conversations(data, image_folder), desc="Reading", unit="row", delay=2):
        row = {**raw, "conversations": parsed.conversations}
        if problem := find_problem(row):
            raise ValueError(f"{where}: {problem}")
        rows.append(row)
        images.append(parsed.images)
    return rows, images


def find_problem(row: dict[str, Any]) -> str | None:
    """Why a conversation is no question with a right answer, if it is none."""
    messages, choices = row["conversations"], row.get("choices")
    if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
        return "expected a question, and last the assistant's right answer"
    right = messages[-1]["content"]
    if IMAGE_PLACEHOLDER in right:
        return f"the right answer has an {IMAGE_PLACEHOLDER}"
    if choices is not None and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        return f"expected a list of texts as choices, got {choices!r}"
    if choices is not None and right not in choices:
        return f"the right answer {right!r} is not among its choices"
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, TypeError) as error:  # half a surrogate pair, or bytes of a Parquet file
        return f"the row cannot be written as JSON ({error})"
    return None


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
    files = [file for source in map(Path, sources) for file in (sorted(source.iterdir()) if source.is_dir() else [source])]
    return hashlib.sha256(repr([(str(file), file_state(str(file))) for file in files]).encode()).hexdigest()


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def answer(model, processor, batch: list[dict[str, Any]], sources: list[list], max_new_tokens: int) -> list[dict[str, Any]]:
    """The rows with "answer" and its measures; those with choices also with "choice" and "choice_right"."""
    images = [[read_image(source) for source in row] for row in sources]
    inputs = encode_questions(processor, [row["conversations"][:-1] for row in batch], images).to(model.device)
    results = []
    for row, text in zip(batch, answer_questions(model, processor, inputs, max_new_tokens=max_new_tokens), strict=True):
        right = row["conversations"][-1]["content"].strip()
        results.append({**row, "answer": text, "right": text == right, "f1": token_f1(text, right)})
    choices = [row.get("choices") or [] for row in batch]
    if any(choices):
        for row, scores in zip(results, choice_scores(model, processor, inputs, choices), strict=True):
            if scores:
                row["choice"] = row["choices"][scores.index(max(scores))]
                row["choice_right"] = row["choice"] == row["conversations"][-1]["content"]
    return results


def table(rows: list[dict[str, Any]]) -> str:
    """The measures of each kind of question, of each language, and of all."""
    right = {id(row): row["conversations"][-1]["content"].strip() for row in rows}
    chinese = {id(row): bool(re.search(f"[{HAN}]", right[id(row)])) for row in rows}
    groups = {
        kind: [row for row in rows if str(row.get("kind") or "") == kind]
        for kind in sorted({str(row.get("kind") or "") for row in rows})
    }
    groups.pop("", None)
    if len(set(chinese.values())) == 2:
        groups["in Chinese"] = [row for row in rows if chinese[id(row)]]
        groups["in other languages"] = [row for row in rows if not chinese[id(row)]]
    groups["all"] = rows
    lines = [f"{'questions':<20}{'asked':>8}{'exact':>9}{'token F1':>10}{'BLEU':>8}{'choice':>9}"]
    for name, group in groups.items():
        exact, f1 = (sum(row[key] for row in group) / len(group) for key in ("right", "f1"))
        bleu = corpus_bleu([row["answer"] for row in group], [right[id(row)] for row in group])
        chosen = [row["choice_right"] for row in group if "choice" in row]
        choice = f"{sum(chosen) / len(chosen):.1%}" if chosen else "–"
        score = "–" if bleu is None else f"{bleu:.1f}"
        lines.append(f"{name:<20}{len(group):>8}{exact:>9.1%}{f1:>10.1%}{score:>8}{choice:>9}")
    if bleu is None:
        lines.append("BLEU needs sacrebleu: pip install sacrebleu")
    return "\n".join(lines)


@errors_in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a saved model")
    parser.add_argument("--data", required=True, type=Path, help="JSONL or Parquet file with the questions and right answers")
    parser.add_argument("--images", required=True, type=Path, help="folder or zip archive that holds the images")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write, one line per question")
    parser.add_argument("--batch-size", type=int, default=50, help="questions at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    parser.add_argument("--int8", action="store_true", help="round the decoder's weights to int8 first, to see what that costs")
    arguments = parser.parse_args()
    if arguments.batch_size < 1 or arguments.max_new_tokens < 1:
        parser.error("--batch-size and --max-new-tokens: expected 1 or more")
    if not arguments.data.is_file() or not arguments.images.exists():
        parser.error(f"expected a file and a folder: --data {arguments.data} --images {arguments.images}")
    if arguments.output.is_dir() or (arguments.output.exists() and arguments.output.samefile(arguments.data)):
        parser.error(f"--output {arguments.output}: expected the name of a new file")

    # ── Questions and model ──
    rows, images = read_questions(arguments.data, arguments.images)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    model, processor = load_model(arguments.model, "int8" if arguments.int8 else "float32")

    # ── Answers ──
    settings = {"model": fingerprint(Path(arguments.model)), "data": fingerprint(arguments.data)}
    settings["images"] = fingerprint(*(source for row in images for source in row if isinstance(source, str)))
    settings |= {"length": arguments.max_new_tokens, "int8": arguments.int8}
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
    exact = sum(row["right"] for row in done)
    print(f"{exact} of {len(done)} answers are exact ({exact / len(done):.1%}). They are in {arguments.output}.")
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
