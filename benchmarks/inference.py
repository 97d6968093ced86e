"""How fast answers come through `generate()`, beside stock transformers, and how far that is from what the machine can do.

    python benchmarks/inference.py

MiniMind2-V small and transformers' LLaVA of the same dimensions, both with random weights, answer questions about an image:

    llava, ours               as from_pretrained gives them, in float32
    … bfloat16                only where the machine multiplies it in hardware
    … int8                    decoder weights rounded by `quantize_int8` (on a CPU)
    … compiled                with a static cache and a compiled forward pass

Each runs in processes of its own, in turns, and the best of all rounds counts: what else the machine does can only slow it
down. Prompts have different lengths. Rates are those after the first token, from the median time between tokens; the JSON file
has those of whole calls too, in which every image must be encoded. "First answer" includes compiling. The limits are what the
matrix products, or reading the weights, would take alone. Needs no network. Prints tables in Markdown, writes them as JSON, and
draws them.
"""

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer import make_llava, make_llava_processor, make_model, make_processor, make_tokenizer, make_words
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, CompileConfig, StoppingCriteria, StoppingCriteriaList
from transformers import __version__ as transformers_version

import minimind_v_hf  # noqa: F401 (registers the Auto classes)
from minimind_v_hf.quantization import has_fast_bf16, quantize_int8
from minimind_v_hf.training import matmul_rate, training_flops


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
BATCHES = (1, 8, 16, 32)


def list_variants(preset: str) -> dict[str, dict[str, Any]]:
    """The contestants: name to model, precision, whether compiled, and what from_pretrained is given."""
    models = ["llava", "ours"] if preset == "minimind2-v-small" else ["ours"]
    precisions = ["float32"] + ["bfloat16"] * has_fast_bf16()
    variants: dict[str, dict[str, Any]] = {}
    for compiled in (False, True):
        for model in models:
            for precision in precisions + ["int8"] * (model == "ours" and DEVICE.type == "cpu"):
                name = " ".join([model, precision, *["compiled"] * compiled])
                variants[name] = {"model": model, "precision": precision, "compiled": compiled, "options": {}}
    kinds = {"attention eager": {"attn_implementation": "eager"}}
    if "moe" in preset:
        kinds |= {f"experts {kind}": {"experts_implementation": kind} for kind in ("eager", "batched_mm", "grouped_mm")}
    for name, options in kinds.items():
        variants[f"ours float32, {name}"] = {"model": "ours", "precision": "float32", "compiled": False, "options": options}
    return variants


# ── One contestant, in a process of its own ──────────────────────────────────────────────────────────────────────────


class Clock(StoppingCriteria):
    """Notes when each token came."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def draw_questions(count: int) -> tuple[list[str], list[Image.Image]]:
    """Prompts of 5 to 40 words, each with an image of 640x480."""
    rng, noise = random.Random(1), np.random.default_rng(1)
    words = make_words(random.Random(0))
    prompts = [f"<image>\n{' '.join(rng.choices(words, k=rng.randint(5, 40)))}" for _ in range(count)]
    coarse = [Image.fromarray(noise.integers(0, 256, (6, 8, 3), dtype=np.uint8)) for _ in range(count)]
    return prompts, [image.resize((640, 480)) for image in coarse]


def measure(variant: dict[str, Any], folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds to load, seconds to the first token, tokens a second by batch size, and the most memory."""
    start = time.perf_counter()
    dtype = getattr(torch, variant["precision"].replace("int8", "float32"))
    model = AutoModelForImageTextToText.from_pretrained(folder / variant["model"], dtype=dtype, **variant["options"])
    model = model.to(DEVICE).eval()
    if variant["precision"] == "int8":
        quantize_int8(model)
    result = {"load_seconds": time.perf_counter() - start}
    processor = AutoProcessor.from_pretrained(folder / variant["model"])
    processor.tokenizer.padding_side = "left"
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": processor.tokenizer.pad_token_id}
    if variant["compiled"]:
        compiling = CompileConfig(fullgraph=True, mode="default")
        compiling._compile_all_devices = True  # transformers compiles by itself on GPUs only
        options |= {"cache_implementation": "static", "compile_config": compiling}

    def ask(batch: int, tokens: int) -> tuple[float, list[float]]:
        """Seconds to the first tokens from images and text, and the times between later ones."""
        prompts, images = draw_questions(batch)
        clock = Clock()
        start = time.perf_counter()
        inputs = processor(text=prompts, images=[[image] for image in images], padding=True, return_tensors="pt")
        inputs = inputs.to(DEVICE, dtype)
        model.generate(**inputs, max_new_tokens=tokens, stopping_criteria=StoppingCriteriaList([clock]), **options)
        return clock.times[0] - start, np.diff(clock.times).tolist()

    start = time.perf_counter()
    ask(1, arguments.tokens)
    result["first_answer_seconds"] = time.perf_counter() - start  # compilation included
    firsts, gaps = zip(*(ask(1, arguments.tokens) for _ in range(3)), strict=True)
    result["first_token_seconds"] = min(firsts)
    result["whole_tokens_per_second_1"] = arguments.tokens / min(
        first + sum(gap) for first, gap in zip(firsts, gaps, strict=True)
    )
    result["tokens_per_second_1"] = 1 / min(float(np.median(gap)) for gap in gaps)
    if not variant["compiled"]:  # compiling for every batch size takes longer than it is worth here
        for batch in BATCHES[1:]:
            first, gap = ask(batch, arguments.tokens)
            result[f"tokens_per_second_{batch}"] = batch / float(np.median(gap))
            result[f"whole_tokens_per_second_{batch}"] = batch * arguments.tokens / (first + sum(gap))
    peak = (
        torch.cuda.max_memory_allocated()
        if DEVICE.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return result | {"peak_gigabytes": peak / 1e9}


# ── What the machine can do ──────────────────────────────────────────────────────────────────────────────────────────


def read_rate() -> float:
    """Bytes a second that a matrix-vector product reads, from a matrix that no cache holds: best of twenty."""
    matrix, vector = torch.randn(8192, 8192, device=DEVICE), torch.randn(8192, device=DEVICE)
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        torch.mv(matrix, vector)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, matrix.numel() * 4 / (time.perf_counter() - start))
    return best


def measure_machine(folder: Path) -> dict[str, float]:
    """The machine's rates, the least that an answer can cost, and images a second through the image processors."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "ours").eval().requires_grad_(False)
    processor = AutoProcessor.from_pretrained(folder / "ours")
    prompts, images = draw_questions(8)
    prompt = processor(text=prompts[:1], images=[images[:1]], return_tensors="pt")["input_ids"].shape[1]
    flops = training_flops(model)
    active = flops["token"] / 2 + model.lm_head.weight.numel()  # weights that a token passes through
    first = flops["image"] + prompt * flops["token"] + prompt * (prompt + 1) / 2 * flops["pair"] + flops["label"]
    rate, reading = matmul_rate(DEVICE, torch.float32), read_rate()
    result = {"float32_gigaflops_per_second": rate / 1e9, "read_gigabytes_per_second": reading / 1e9, "prompt_tokens": prompt}
    result["floor_first_token_seconds_float32"] = first / rate
    if has_fast_bf16():
        result["floor_first_token_seconds_bfloat16"] = first / matmul_rate(DEVICE, torch.bfloat16)
    for precision, size in BYTES.items():
        result[f"floor_tokens_per_second_{precision}"] = reading / (active * size)
    start = time.perf_counter()
    for _ in range(5):
        processor.image_processor(images, return_tensors="pt")
    result["images_per_second"] = 5 * len(images) / (time.perf_counter() - start)
    return result


# ── The tables and the chart ─────────────────────────────────────────────────────────────────────────────────────────


def best_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The best value of each measure."""
    return {
        name: (max if "_per_second" in name else min)(row[name] for row in rounds)  # rates, or seconds and bytes
        for name in rounds[0]
    }


def tables(results: dict[str, dict[str, float]], machine: dict[str, float], variants: dict[str, dict[str, Any]]) -> str:
    base = results.get("llava float32")

    def ratio(row: dict[str, float], name: str) -> str:
        if base is None or name not in row:
            return ""
        value = row[name] / base[name]
        return f" ({1 / value if 'seconds' in name else value:.2f} x)"

    batches = [f"batch {number}" for number in BATCHES[1:]]
    columns = ["", "first token", "its limit", "tokens/s, one answer", "of the limit", *batches]
    columns += ["batch 16 : 16 calls", "first answer", "memory", "load"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for variant, row in results.items():
        floor = machine[f"floor_tokens_per_second_{variants[variant]['precision']}"]
        names = [f"tokens_per_second_{n}" for n in BATCHES[1:]]
        cells = [
            variant,
            f"{row['first_token_seconds']:.3f} s{ratio(row, 'first_token_seconds')}",
            f"{machine['floor_first_token_seconds_' + variants[variant]['precision'].replace('int8', 'float32')]:.3f} s",
            f"{row['tokens_per_second_1']:.0f}{ratio(row, 'tokens_per_second_1')}",
            f"{row['tokens_per_second_1'] / floor:.0%}",
            *[f"{row[name]:.0f}{ratio(row, name)}" if name in row else "–" for name in names],
            f"{row['tokens_per_second_16'] / row['tokens_per_second_1']:.1f} x" if "tokens_per_second_16" in row else "–",
            f"{row['first_answer_seconds']:.1f} s",
            f"{row['peak_gigabytes']:.2f} GB",
            f"{row['load_seconds']:.2f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| the machine | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {value:,.3g} |" for name, value in machine.items()]
    return "\n".join(lines)


def draw(
    results: dict[str, dict[str, float]], machine: dict[str, float], variants: dict[str, dict[str, Any]], path: Path
) -> None:
    """Bars: tokens a second, with a mark where reading the weights would be all, and time to the first token."""
    from matplotlib.figure import Figure

    names = list(results)[::-1]
    colours = ["#9aa0a6" if variants[name]["model"] == "llava" else "#1f77b4" for name in names]
    figure = Figure(figsize=(10, 0.4 * len(names) + 1.2), layout="constrained")
    rate, first = figure.subplots(1, 2, sharey=True)
    rate.barh(names, [results[name]["tokens_per_second_1"] for name in names], color=colours)
    floors = [machine[f"floor_tokens_per_second_{variants[name]['precision']}"] for name in names]
    rate.plot(floors, names, "|", color="black", markersize=12, label="reading the weights alone")
    rate.set_xlabel("tokens/s of one answer (more is better)")
    rate.legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize="small")
    first.barh(names, [1000 * results[name]["first_token_seconds"] for name in names], color=colours)
    first.axvline(
        1000 * machine["floor_first_token_seconds_float32"], color="black", linestyle=":", label="float32 products alone"
    )
    first.set_xlabel("ms to the first token, image included (less is better)")
    first.legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset",
        choices=("minimind2-v-small", "minimind2-v", "minimind2-v-moe"),
        default="minimind2-v-small",
        help="of our model (default: %(default)s, which alone has a LLaVA to match)",
    )
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns, of which the best counts (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", help="which to measure, by name (default: all)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-inference"), help="folder (default: %(default)s)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    variants, folder = list_variants(arguments.preset), arguments.output / arguments.preset
    if unknown := set(arguments.variants or ()) - set(variants):
        parser.error(f"unknown: {', '.join(sorted(unknown))}. There are: {', '.join(variants)}")
    if arguments.only:
        result = (
            measure_machine(folder) if arguments.only == "machine" else measure(variants[arguments.only], folder, arguments)
        )
        (folder / "result.json").write_text(json.dumps(result))
        return

    variants = {name: variant for name, variant in variants.items() if name in (arguments.variants or variants)}
    processor = make_processor(make_tokenizer(make_words(random.Random(0))))
    for name, model, its_processor in (
        ("ours", make_model(processor, arguments.preset), processor),
        ("llava", make_llava(processor.image_token_id), make_llava_processor(processor)),
    ):
        model.save_pretrained(folder / name)
        its_processor.save_pretrained(folder / name)
    del model

    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in [*variants, "machine"]}
    for turn in range(arguments.rounds):
        for name, results in rounds.items():
            print(f"Measuring, turn {turn + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], check=True)
            results.append(json.loads((folder / "result.json").read_text()))
    about = {
        "machine": torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "preset": arguments.preset,
        "tokens": arguments.tokens,
    }
    results = {name: best_of(turns) for name, turns in rounds.items()}
    machine = results.pop("machine")
    saved = {"about": about, "machine": machine, "results": results}
    (arguments.output / "results.json").write_text(json.dumps(saved, indent=2) + "\n")
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    print(tables(results, machine, variants))
    draw(results, machine, variants, arguments.output / "inference.png")
    print(f"\nDrawn in {arguments.output / 'inference.png'}")


if __name__ == "__main__":
    main()
