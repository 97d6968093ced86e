"""Train a tiny vision-language model from scratch on your own CPU, and see it answer about images that it was never shown.

    python examples/quickstart.py

Draws a bilingual data set of coloured shapes, trains encoder, projector and decoder on it, saves a folder for the Hub, loads
that folder in a fresh process, asks about held-out images, and draws what came out. Takes about four minutes on two cores
and needs no network. It ends with exit code 1 if the saved model does not answer as the trained one does.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import CLIPImageProcessorPil, Trainer, TrainingArguments

import minimind_v_hf
from minimind_v_hf import MiniMindVConfig, MiniMindVForConditionalGeneration, MiniMindVProcessor
from minimind_v_hf.chat import answer_questions, encode_questions
from minimind_v_hf.data import MiniMindVCollator, load_conversations, tokenize_conversations
from minimind_v_hf.data.images import read_image
from minimind_v_hf.files import make_readable
from minimind_v_hf.measures import commonest_right
from minimind_v_hf.preparation import build_chat_template, prepare_tokenizer, train_tokenizer
from minimind_v_hf.scripts import errors_in_one_line
from minimind_v_hf.shapes import IMAGE_SIZE, write_data_set


PATCH_SIZE = 16  # so that an image of 64 pixels becomes 4 x 4 patches
NEW_TOKENS = 12  # of the longest answer
CHECKED = 50  # held-out questions that the trained model answers too
ENOUGH = 10_000  # images, from which on a run must have learned


@errors_in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder to write (default: %(default)s)")
    parser.add_argument("--train-images", type=int, default=13_000, help="images to train on (default: %(default)s)")
    parser.add_argument("--test-images", type=int, default=300, help="images to hold out (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.train_images < 1 or arguments.test_images < 4:
        parser.error("expected --train-images of 1 or more, and --test-images of 4 or more")
    from minimind_v_hf.drawing import draw_answers, draw_curves  # needs matplotlib

    folder, stages, clock = arguments.output, {}, time.perf_counter()
    torch.set_num_threads(1)  # the matrices are too small for more; another core reads images

    def stage_done(name: str) -> None:
        nonlocal clock
        stages[name], clock = time.perf_counter() - clock, time.perf_counter()

    # ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    data = folder / "data"
    write_data_set(data, arguments.train_images, arguments.test_images, turns=7)
    stage_done("draw the data set")

    with open(data / "train.jsonl", encoding="utf-8") as file:
        texts = [message["content"] for line in file for message in json.loads(line)["conversations"]]
    texts += ["user\n", "assistant\n"] * 1000  # words of the chat template
    chat_template = build_chat_template("<image>", default_system=None, thinking=False)
    tokenizer = prepare_tokenizer(train_tokenizer(texts, vocab_size=512, across_words=True), chat_template)

    # ── Model ────────────────────────────────────────────────────────────────────────────────────────────────────────
    torch.manual_seed(0)
    config = MiniMindVConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,  # large for so narrow a model, which lets attention find its feet sooner
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        image_token_id=tokenizer.image_token_id,
    )
    model = MiniMindVForConditionalGeneration(config)
    # As strong as the patches, so that the model learns early on where a patch lies
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight)
    print(f"The model has {model.num_parameters():,} parameters and an image is {config.image_seq_length} tokens to it.")
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.9] * 3,  # so that the background is about zero
        image_std=[0.25] * 3,
    )
    processor = MiniMindVProcessor.build(image_processor, tokenizer, config)
    train_set = tokenize_conversations(load_conversations(data / "train.jsonl", data / "images"), processor)
    stage_done("tokenise")

    # ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            per_device_train_batch_size=8,
            num_train_epochs=1,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            adam_beta2=0.99,
            optim="adamw_torch_fused",
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_num_workers=1,
        ),
        train_dataset=train_set,
        data_collator=MiniMindVCollator(processor),
    )
    trainer.train()
    model_folder = folder / "model"
    model.save_pretrained(model_folder)
    processor.save_pretrained(model_folder)
    make_readable(model_folder)
    draw_curves(trainer.state.log_history, folder / "loss.png")
    stage_done("train and save")

    # ── Held-out questions, in a process of their own that knows only the saved folder ───────────────────────────────
    answers = folder / "answers.jsonl"
    evaluate = [sys.executable, str(Path(__file__).with_name("evaluate.py")), "--model", str(model_folder)]
    evaluate += ["--data", str(data / "test.jsonl"), "--images", str(data / "images"), "--output", str(answers)]
    subprocess.run([*evaluate, "--max-new-tokens", str(NEW_TOKENS)], check=True)
    with open(answers, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    # Without a cache: each token by a forward pass over all before it, as in training
    asked = [row["conversations"][:1] for row in rows[:CHECKED]]
    images = [str(data / "images" / row["image"]) for row in rows]
    inputs = encode_questions(processor, asked, [[read_image(image)] for image in images[:CHECKED]])
    expected = answer_questions(model, processor, inputs, max_new_tokens=NEW_TOKENS, use_cache=False)
    stage_done("load and answer")

    # ── What came out ────────────────────────────────────────────────────────────────────────────────────────────────
    draw_answers(list(zip(rows, images, strict=True)), folder / "answers.png")
    stage_done("draw the sheets")
    exact, majority = sum(row["right"] for row in rows) / len(rows), commonest_right(rows) / len(rows)
    print()
    for name, seconds in [*stages.items(), ("total", sum(stages.values()))]:
        print(f"{name:<20}{seconds:>7.1f} s")
    results = {"exact": exact, "majority_answer": majority, "seconds": stages}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    different = [(row, text) for row, text in zip(rows, expected, strict=False) if row["answer"] != text]
    problem = ""
    if different:
        row, text = different[0]
        problem = (
            f"the saved model answers {len(different)} of {len(expected)} held-out questions otherwise than the trained one: "
            f"{row['answer']!r}, where that says {text!r}"
        )
    elif arguments.train_images >= ENOUGH and exact < (1 + majority) / 2:  # a whole run gets nearly all of them right
        problem = f"{exact:.0%} of the held-out answers are right, and the commonest would give {majority:.0%}"
    if problem:
        versions = f"minimind_v_hf {minimind_v_hf.__version__}, transformers {transformers.__version__}"
        advice = "install a version of transformers that the README names as tested, and please report this"
        parser.exit(1, f"\nFAILED: {problem} ({versions}): {advice}.\n")
    print(f"\nLook at {folder / 'answers.png'} and {folder / 'loss.png'}. Talk to the model:")
    image = data / "images" / "test-00000.jpg"
    python = Path(os.path.relpath(sys.executable)).as_posix()
    print(f'{python} examples/chat.py --model {model_folder} --image {image} "How many shapes are there?"')


if __name__ == "__main__":
    main()
