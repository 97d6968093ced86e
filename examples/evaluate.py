"""Ask a saved model every question of a data set, in batches, and count the exact answers.

    python examples/evaluate.py --model runs/quickstart/model --data runs/quickstart/data/test.jsonl \\
        --images runs/quickstart/data/images --output answers.jsonl

The data set is JSONL in the MiniMind-V format; the last message of each row is the right answer. Only transformers is
needed, not this package: a saved folder brings its own code.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a saved model")
    parser.add_argument("--data", required=True, type=Path, help="JSONL file with the questions and right answers")
    parser.add_argument("--images", required=True, type=Path, help="folder that holds the pictures")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write, one line per question")
    parser.add_argument("--batch-size", type=int, default=50, help="questions at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    arguments = parser.parse_args()
    for path in (arguments.data, arguments.images):
        if not path.exists():
            parser.error(f"there is no {path}")

    # ── Model ──
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, trust_remote_code=True).to(device).eval()

    # ── Questions ──
    with open(arguments.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    # ── Answers ──
    exact = 0
    unfinished = arguments.output.with_suffix(".part")
    with open(unfinished, "w", encoding="utf-8") as file, tqdm(total=len(rows), desc="Answering", unit="question") as progress:
        for start in range(0, len(rows), arguments.batch_size):
            batch = rows[start : start + arguments.batch_size]
            prompts = processor.apply_chat_template([row["conversations"][:-1] for row in batch], add_generation_prompt=True)
            names = [[name.strip() for name in row.get("image", "").split(",") if name.strip()] for row in batch]
            images = [[str(arguments.images / name) for name in some] for some in names]
            inputs = processor(text=prompts, images=images if any(images) else None, padding=True, return_tensors="pt")
            output = model.generate(**inputs.to(device), max_new_tokens=arguments.max_new_tokens, do_sample=False)
            answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, answer in zip(batch, answers, strict=True):
                right = answer.strip() == row["conversations"][-1]["content"].strip()
                exact += right
                file.write(json.dumps({**row, "answer": answer.strip(), "right": right}, ensure_ascii=False) + "\n")
            progress.update(len(batch))
    unfinished.replace(arguments.output)
    print(f"{exact} of {len(rows)} answers are exact ({exact / max(len(rows), 1):.1%}). They are in {arguments.output}.")


if __name__ == "__main__":
    main()
