"""How fast training goes from files on disk, beside stock transformers, and where the time goes.

    python benchmarks/training.py --steps 6

Draws data shaped like MiniMind-V's (JPEGs of 256 pixels, 196 image tokens, 20 to 300 text tokens), and trains MiniMind2-V small
on it in these variants, each in a process of its own so that its peak memory is its own:

    stock       transformers' LLaVA of the same size, default Trainer settings, padded to the maximum length
    frozen      the same, with our parts frozen and our batch size
    fair        and padded to the longest sample of the batch
    bf16        and in bfloat16, where there is hardware for it
    best        and with samples of like length together: stock LLaVA in its best setting
    unpacked    MiniMindVTrainer with dynamic padding, in bfloat16 where there is hardware for it
    grouped     the same, samples of like length together
    logits      the same as grouped, but with logits at every position, not at labels alone
    float32     the same as grouped, but in float32
    packed      the same as unpacked, but several samples in a row
    kept        grouped, with the frozen encoder's output kept on disk: what every epoch after the first costs

All but `stock` and `packed` see the same samples, and the loss is the mean over the measured steps. On a CPU that others use
too, its time tells more than the clock's. Needs no network. Prints a table in Markdown, and writes it as JSON, with what it
was measured on.
"""

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from peer import make_llava, make_llava_processor, make_model, make_processor, make_tokenizer, make_words
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers import __version__ as transformers_version
from transformers.trainer_pt_utils import get_length_grouped_indices

from minimind_v_hf import MiniMindVProcessor
from minimind_v_hf.data import MiniMindVCollator, load_conversations, pack, tokenize_conversations
from minimind_v_hf.hardware import has_fast_bf16, matmul_rate
from minimind_v_hf.training import (
    MiniMindVTrainer,
    cache_features,
    freeze,
    native_recipe,
    training_flops,
)


PEERS = ("stock", "frozen", "fair", "bf16", "best")  # each has what the one before it has, and one thing more
VARIANTS = (*PEERS, "unpacked", "grouped", "logits", "float32", "packed", "kept")
STAGES = {
    "pretrain": {"trainable": "projector", "max_length": 640, "batch": 16, "pack_length": 1280},
    "sft": {"trainable": "llm", "max_length": 1536, "batch": 4, "pack_length": 1536},
}
WORKERS = 8 if torch.cuda.is_available() else 0  # on a CPU they would only take turns
WARM_UP = 1  # steps that are not measured


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_data(folder: Path, rows: int) -> None:
    """JPEGs with structure and noise, and conversations of 20 to 300 text tokens about them, template included."""
    rng = random.Random(0)
    noise = np.random.default_rng(0)
    words = make_words(rng)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    make_tokenizer(words).save_pretrained(folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for number in tqdm(range(rows), desc="Drawing data", unit="row"):
            coarse = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((256, 256))
            pixels = np.asarray(coarse, dtype=np.int16) + noise.integers(-12, 13, (256, 256, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.jpg", quality=90)
            text: list[str] = []
            wanted = rng.randint(20, 300) - 18  # what the template takes, about
            while len(tokenizer(" ".join(text)).input_ids) < wanted:
                text.append(rng.choice(words))
            cut = min(len(text) // 3, 12)
            turns = [
                {"role": "user", "content": "<image>\n" + " ".join(text[:cut])},
                {"role": "assistant", "content": " ".join(text[cut:])},
            ]
            file.write(json.dumps({"conversations": turns, "image": f"{number}.jpg"}) + "\n")


# ── The contestants ──────────────────────────────────────────────────────────────────────────────────────────────────


class Stopwatch(TrainerCallback):
    """The time from the end of the warm-up to the end of the last step: by the clock, and of this process on the processor."""

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = (time.perf_counter(), time.process_time())
        if state.global_step == WARM_UP:
            self.started = now
        self.ended = now


class Counter:
    """Counts the samples, tokens and positions of each step of a trainer."""

    def __init__(self, trainer: Trainer, pad_token_id: int):
        self.steps: list[tuple[int, int, int]] = []
        training_step = trainer.training_step

        def count(model, inputs, *args, **kwargs):
            ids = inputs["input_ids"]
            full = ids != pad_token_id
            # A packed row has as many samples as times at which its positions start anew
            samples = int(((inputs["position_ids"] == 0) & full).sum()) if "position_ids" in inputs else len(ids)
            self.steps.append((samples, int(full.sum()), ids.numel()))
            return training_step(model, inputs, *args, **kwargs)

        trainer.training_step = count

    def measured(self) -> tuple[int, int, int]:
        return tuple(map(sum, zip(*self.steps[WARM_UP:], strict=True)))  # type: ignore[return-value]


def load_processor(folder: Path) -> MiniMindVProcessor:
    return make_processor(PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"))


def arrange(data: Dataset, lengths: Sequence[int], batch: int, steps: int, grouped: bool) -> Dataset:
    """As many rows as there are steps, those after the warm-up as they come or, as in a long run, grouped by length."""
    start, end = WARM_UP * batch, (WARM_UP + steps) * batch
    order = list(range(end))
    if grouped:
        generator = torch.Generator().manual_seed(0)
        order[start:] = [start + i for i in get_length_grouped_indices(lengths[start:end], batch, steps, generator)]
    return data.select(order)


def run_peer(folder: Path, stage: dict, arguments: argparse.Namespace, variant: str) -> Trainer:
    """As a user of transformers would write it: a processor call for each batch, and everything else by default."""
    frozen, dynamic, bf16, grouped = (PEERS.index(variant) >= PEERS.index(peer) for peer in PEERS[1:])
    ours = load_processor(folder)
    model, processor = make_llava(ours.image_token_id), make_llava_processor(ours)
    if arguments.attention:
        model.set_attn_implementation(arguments.attention)
    if frozen:
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        model.model.language_model.requires_grad_(stage["trainable"] == "llm")  # and with it the head, which is tied
    padding = {"padding": "longest"} if dynamic else {"padding": "max_length", "max_length": stage["max_length"]}

    def collate(rows):
        prompts = ours.apply_chat_template([row["conversations"] for row in rows])
        images = [[Image.open(name).convert("RGB") for name in row["images"]] for row in rows]
        batch = processor(text=prompts, images=images, **padding, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"] = labels.masked_fill(labels == ours.image_token_id, -100)
        return dict(batch)

    args = TrainingArguments(
        output_dir=str(folder / variant),
        max_steps=arguments.steps + WARM_UP,
        per_device_train_batch_size=stage["batch"] if frozen else 8,
        train_sampling_strategy="sequential",
        bf16=bf16 and has_fast_bf16(),
        dataloader_num_workers=WORKERS if grouped else 0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # or the images are lost
        use_cpu=not torch.cuda.is_available(),
    )
    data = load_conversations(folder / "train.jsonl", folder / "images")
    data = arrange(
        data, tokenize_conversations(data, ours, stage["max_length"])["length"], stage["batch"], arguments.steps, grouped
    )
    return Trainer(model=model, args=args, train_dataset=data, data_collator=collate)


def run_ours(folder: Path, stage: dict, arguments: argparse.Namespace, variant: str) -> Trainer:
    processor = load_processor(folder)
    model = make_model(processor)
    freeze(model, stage["trainable"])
    data = tokenize_conversations(load_conversations(folder / "train.jsonl", folder / "images"), processor, stage["max_length"])
    if arguments.attention:
        model.set_attn_implementation(arguments.attention)
    if variant == "logits":
        model.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {"skip_logits": False}), with_kwargs=True)
    bf16 = has_fast_bf16() and variant != "float32"
    collator = MiniMindVCollator(processor, uint8_pixels=variant != "kept")
    if variant != "packed":
        data = arrange(data, data["length"], stage["batch"], arguments.steps, variant != "unpacked")
    if variant == "kept":
        if torch.cuda.is_available():
            model.cuda()
        dtype = torch.bfloat16 if bf16 else torch.float32
        collator = cache_features(model, collator, [data], folder / "features", dtype)
        for rows in data.iter(16):  # what the first epoch does beside training
            batch = collator([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)])
            collator.cache.encode_missing(model, (), send_to_device(batch, model.device))
    batch_size = stage["batch"]
    if variant == "packed":
        batch_size = max(1, batch_size * 380 // stage["pack_length"])  # a sample has 380 tokens or so
        rows_in_one = batch_size if "flash" in arguments.attention else 1  # which keeps samples apart in one row only
        data, batch_size = pack(data, stage["pack_length"] * rows_in_one), batch_size // rows_in_one
    args = TrainingArguments(
        **native_recipe()
        | {
            "output_dir": str(folder / variant),
            "max_steps": arguments.steps + WARM_UP,
            "per_device_train_batch_size": batch_size,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": bf16,
            "dataloader_num_workers": WORKERS,
            "logging_steps": 1,
        }
    )
    return MiniMindVTrainer(model=model, args=args, train_dataset=data, data_collator=collator, processing_class=processor)


def measure(variant: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one variant, in this process."""
    stage = STAGES[arguments.stage] | ({"batch": arguments.batch} if arguments.batch else {})
    trainer = (run_peer if variant in PEERS else run_ours)(folder, stage, arguments, variant)
    counter = Counter(trainer, load_processor(folder).tokenizer.pad_token_id)
    watch = Stopwatch()
    trainer.add_callback(watch)
    trainer.train()
    seconds, cpu_seconds = (end - start for start, end in zip(watch.started, watch.ended, strict=True))
    samples, tokens, positions = counter.measured()
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry][WARM_UP:]
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "samples_per_second": samples / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gigabytes": peak / 1e9,
        "padding_share": 1 - tokens / positions,
        "cpu_seconds_per_sample": cpu_seconds / samples,
        "loss": sum(entry["loss"] for entry in logs) / len(logs),
        "matrix_rate_share": sum(entry["mfu"] for entry in logs) / len(logs) if variant not in PEERS else None,
    }


# ── Where the time goes ──────────────────────────────────────────────────────────────────────────────────────────────


def profile(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds a sample in each part of an unpacked step, by hand; and the least that the FLOPs alone would take."""
    stage, device = STAGES[arguments.stage], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(folder)
    model = make_model(processor).to(device).train()
    freeze(model, stage["trainable"])
    data = tokenize_conversations(load_conversations(folder / "train.jsonl", folder / "images"), processor, stage["max_length"])
    collator = MiniMindVCollator(processor)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    seconds = dict.fromkeys(("decode and collate", "encode", "decoder and loss forward", "backward", "optimiser"), 0.0)
    bf16 = has_fast_bf16()
    # A processor may be shared, and other work is not ours to count
    clock_of_device = time.perf_counter if device.type == "cuda" else time.process_time

    def lap(name: str, started: float, counted: bool) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = clock_of_device()
        if counted:
            seconds[name] += now - started
        return now

    samples = flops = 0.0
    for step in range(arguments.steps + WARM_UP):
        counted, clock = step >= WARM_UP, clock_of_device()
        first = step * stage["batch"]
        batch = collator([data[index % len(data)] for index in range(first, first + stage["batch"])])
        clock = lap("decode and collate", clock, counted)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            pixels = batch.pop("pixel_values")
            images = model.get_image_features(pixels, return_dict=True)
            clock = lap("encode", clock, counted)
            loss = model(**batch, mm_encoder_outputs={"image": images}, skip_logits=True, use_cache=False).loss
        clock = lap("decoder and loss forward", clock, counted)
        loss.backward()
        clock = lap("backward", clock, counted)
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lap("optimiser", clock, counted)
        if counted:
            lengths = batch["attention_mask"].sum(1)
            each = training_flops(model)
            flops += each["token"] * float(lengths.sum()) + each["pair"] * float((lengths * (lengths + 1) / 2).sum())
            flops += each["label"] * float((batch["labels"] != -100).sum()) + each["image"] * len(pixels)
            samples += stage["batch"]
    rate = matmul_rate(device, torch.bfloat16 if bf16 else torch.float32, None if device.type == "cuda" else clock_of_device)
    floor = flops / samples / rate
    return {**{name: value / samples for name, value in seconds.items()}, "FLOPs at the matrix rate": floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="steps to measure, after a warm-up (default: %(default)s)")
    parser.add_argument("--stage", choices=STAGES, default="pretrain", help="whose recipe (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=512, help="rows of data (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="samples in a step, but in stock's defaults (default: the recipe's)")
    parser.add_argument("--attention", default="", help="attn_implementation, such as flash_attention_2 (default: sdpa)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-training"), help="folder (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="which to measure (default: all)")
    parser.add_argument("--only", choices=[*VARIANTS, "profile"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows < (WARM_UP + arguments.steps) * (arguments.batch or STAGES[arguments.stage]["batch"]):
        parser.error(f"--rows {arguments.rows}: expected a batch for each of --steps {arguments.steps}, and one to warm up.")
    data = arguments.output / f"data-{arguments.rows}"
    if arguments.only:
        result = profile(data, arguments) if arguments.only == "profile" else measure(arguments.only, data, arguments)
        (arguments.output / f"{arguments.only}.json").write_text(json.dumps(result))
        return

    if not (data / "train.jsonl").exists():
        write_data(data, arguments.rows)
    results = {}
    for only in [*arguments.variants, "profile"]:
        print(f"Measuring: {only}", flush=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", only], check=True)
        results[only] = json.loads((arguments.output / f"{only}.json").read_text())
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()}"
    about = {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "stage": arguments.stage,
        "attention": arguments.attention or "sdpa",
        "steps": arguments.steps,
    }
    (arguments.output / "results.json").write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")

    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    columns = (
        "",
        "samples/s",
        "of stock",
        "of best",
        "CPU s/sample",
        "of stock",
        "of best",
        "peak memory",
        "padding",
        "loss",
        "of the matrix rate",
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for variant in arguments.variants:
        row = results[variant]
        peers = [results.get(peer) for peer in ("stock", "best")]
        clock = [f"{row['samples_per_second'] / peer['samples_per_second']:.2f} x" if peer else "" for peer in peers]
        work = [f"{peer['cpu_seconds_per_sample'] / row['cpu_seconds_per_sample']:.2f} x" if peer else "" for peer in peers]
        cells = [variant, f"{row['samples_per_second']:.2f}", *clock, f"{row['cpu_seconds_per_sample']:.2f}", *work]
        cells += [f"{row['peak_gigabytes']:.2f} GB", f"{row['padding_share']:.0%}", f"{row['loss']:.3f}"]
        print(f"| {' | '.join(cells)} | {f'{share:.0%}' if (share := row['matrix_rate_share']) else ''} |")
    print("\n| a sample, unpacked | ms (on a CPU, of its own time) |\n|---|---|")
    for name, value in results["profile"].items():
        print(f"| {name} | {1000 * value:.1f} |")


if __name__ == "__main__":
    main()
