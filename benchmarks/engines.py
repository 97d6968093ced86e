"""One model in every engine: how fast it answers here, what it weighs, and whether its answers stay the same.

    python benchmarks/engines.py                                 # MiniMind2-V small with random weights: for the speed
    python benchmarks/engines.py --model runs/quickstart/model --data runs/quickstart/data/test.jsonl \\
        --images runs/quickstart/data/images                     # a trained model: for the answers

The model is exported for each engine. All of them answer the same questions about the same images, greedily, each in a process
of its own, in turns; the best time of all rounds counts, since what else the machine does can only slow it down. Measured are

    first token    seconds from a file and a question to the first token
    tokens/s       those after the first; and of 16 answers at once, where an engine takes batches
    size, memory   of the weights on disk, and the most that the process held
    equal          the share of tokens that are those of transformers in float32, up to the first that differs

The limits are what reading the weights, as fast as PyTorch's product of a matrix and a vector reads, or what the products of
matrices would take alone. What is not installed is named and left out: transformers.js wants `npm ci --prefix
examples/browser`, in a browser also playwright and chromium, llama.cpp the extra `gguf`, vLLM an environment of its own
(--vllm). On a machine with a CUDA GPU, transformers and LLaVA run there (--engines leaves the others out). Prints a table in
Markdown, writes it as JSON, and draws it. Needs no network.
"""

import argparse
import importlib.util
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from minimind_v_hf.hardware import has_fast_bf16


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BROWSER = ROOT / "examples" / "browser"
RUNS = str(HERE / "engine_runs.py")
ONNX_SUFFIXES = {"fp32": "", "q8": "_quantized", "q4": "_q4"}
JAVASCRIPT = ("transformers.js in Node", "transformers.js in Chromium")
REFERENCE = "transformers, float32"


class Contestant(NamedTuple):
    """An engine with a precision."""

    engine: str
    precision: str
    bits: int
    """Of a weight, for the limit."""
    needs: tuple[str, ...] = ()
    """Modules of Python, commands (with a blank before) and paths, without which it is left out."""

    @property
    def name(self) -> str:
        return f"{self.engine}, {self.precision}"

    def missing(self) -> list[str]:
        """What it needs and lacks here."""

        def is_there(need: str) -> bool:
            if "/" in need:
                return Path(need).exists()
            return bool(shutil.which(need.strip()) if need.startswith(" ") else importlib.util.find_spec(need))

        slow = ["bfloat16 in hardware"] if self.precision == "bfloat16" and not has_fast_bf16() else []
        return [need.strip() for need in self.needs if not is_there(need)] + slow


def contestants(vllm: str | None) -> list[Contestant]:
    """All that there are."""
    found = [Contestant("transformers", "float32", 32), Contestant("transformers", "bfloat16", 16)]
    found += [Contestant("transformers compiled", *rest) for _, *rest in found]
    found += [Contestant("stock LLaVA", "float32", 32)]
    onnx = ("onnx", "onnxscript", "onnxruntime")
    node = (*onnx, " node", str(BROWSER / "node_modules"))
    chromium = (*node, "playwright", " chromium")
    for engine, needs in zip(("ONNX Runtime", *JAVASCRIPT), (onnx, node, chromium), strict=True):
        found += [Contestant(engine, dtype, bits, needs) for dtype, bits in zip(ONNX_SUFFIXES, (32, 8, 4), strict=True)]
    for dtype, bits in (("f32", 32), ("f16", 16), ("q8_0", 8), ("q4_0", 4)):
        found += [Contestant("llama.cpp", dtype, bits, ("gguf", "xllamacpp"))]
    return [*found, Contestant("vLLM", "float32", 32, (vllm or "/no --vllm",))]


# ── The model, its exports, and the questions ────────────────────────────────────────────────────────────────────────


def draw_questions(folder: Path) -> list[dict[str, str]]:
    """Questions of 5 to 40 words, each with a square image, which every engine scales alike."""
    import numpy as np
    from peer import make_words
    from PIL import Image

    folder.mkdir()
    rng, noise, rows = random.Random(1), np.random.default_rng(1), []
    words = make_words(random.Random(0))
    for number in range(4):
        path = folder / f"{number}.png"
        Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((448, 448)).save(path)
        rows.append({"image": str(path), "text": " ".join(rng.choices(words, k=rng.randint(5, 40)))})
    return rows


def choose_questions(data: Path, images: Path, folder: Path) -> list[dict[str, str]]:
    """The first question of 32 rows with one image, as PNG files."""
    from PIL import Image

    folder.mkdir()
    with open(data, encoding="utf-8") as file:
        rows = [row for line in file if isinstance((row := json.loads(line)).get("image"), str)]
    found = []
    for number, row in enumerate(rows[:: max(1, len(rows) // 32)][:32]):
        path = folder / f"{number}.png"
        Image.open(images / row["image"]).convert("RGB").save(path)
        found.append({"image": str(path), "text": row["conversations"][0]["content"].replace("<image>", "").strip()})
    return found


def prepare(arguments: argparse.Namespace, folder: Path, engines: set[str]) -> set[str]:
    """Write model, questions, and what the engines read. Returns the engines that have no graph for this model."""
    from peer import make_model, make_processor, make_tokenizer, make_words

    if arguments.model:
        shutil.copytree(arguments.model, folder / "model")
        questions = choose_questions(arguments.data, arguments.images, folder / "images")
    else:
        processor = make_processor(make_tokenizer(make_words(random.Random(0))))
        make_model(processor).save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        questions = draw_questions(folder / "images")
    (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    refused: set[str] = set()
    for kind, readers, options in (
        ("llava", {"stock LLaVA"}, []),
        ("onnx", {"ONNX Runtime", *JAVASCRIPT}, ["--dtype", *ONNX_SUFFIXES]),
        ("gguf", {"llama.cpp"}, ["--dtype", "f32", "f16", "q8_0", "q4_0"]),
    ):
        if engines & readers:
            command = [sys.executable, str(ROOT / "convert" / f"to_{kind}.py"), "--model", str(folder / "model")]
            done = subprocess.run([*command, "--output", str(folder / kind), *options], check=False)
            refused |= readers if done.returncode else set()  # which it has told itself
    for dtype in ONNX_SUFFIXES if engines & set(JAVASCRIPT) - refused else ():
        only_dtype(folder, dtype)
    return refused


def only_dtype(folder: Path, dtype: str) -> None:
    """A copy of the ONNX folder with a configuration that asks transformers.js for this precision."""
    copy = folder / f"onnx-{dtype}"
    shutil.copytree(folder / "onnx", copy, ignore=shutil.ignore_patterns("*.onnx*"))
    (copy / "onnx").rmdir()
    (copy / "onnx").symlink_to(folder.resolve() / "onnx" / "onnx")
    path = copy / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["transformers.js_config"] = {"dtype": dtype}  # in place of a choice for each device
    path.write_text(json.dumps(config), encoding="utf-8")


def size_on_disk(folder: Path, contestant: Contestant) -> int:
    """Bytes of the weights, encoder included."""
    precision = contestant.precision
    if contestant.engine in ("ONNX Runtime", *JAVASCRIPT):
        graphs = ("vision_encoder", "embed_tokens", "decoder_model_merged")
        names = [f"onnx/onnx/{graph}{ONNX_SUFFIXES[precision]}.onnx*" for graph in graphs]
    elif contestant.engine == "llama.cpp":
        names = [f"gguf/model-{precision.upper()}.gguf", f"gguf/mmproj-model-{'F32' if precision == 'f32' else 'F16'}.gguf"]
    else:
        names = ["llava/*.safetensors" if contestant.engine == "stock LLaVA" else "model/*.safetensors"]
    return sum(path.stat().st_size for name in names for path in folder.glob(name))


# ── The turns, the table and the chart ───────────────────────────────────────────────────────────────────────────────


def run_once(contestant: Contestant, arguments: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """The result of one process; None where it failed."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    if contestant.engine == "transformers.js in Node":
        given = {"folder": str(folder / f"onnx-{contestant.precision}"), "questions": str(folder / "questions.json")}
        given |= {"tokens": arguments.tokens, "library": str(BROWSER / "node_modules"), "result": str(result)}
        command = ["node", str(HERE / "engines.mjs"), json.dumps(given)]
    else:
        python = arguments.vllm if contestant.engine == "vLLM" else sys.executable
        command = [python, RUNS, str(folder), contestant.engine, contestant.precision, str(arguments.tokens)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    if status or not result.exists():
        print(f"{contestant.name} failed: see {folder / 'log.txt'}", file=sys.stderr)
        return None
    return json.loads(result.read_text(encoding="utf-8"))


def equal_share(texts: list[str], reference: list[str], tokenizer) -> float:
    """Of the tokens of the reference: those before the first that differs."""
    equal = asked = 0
    for text, right in zip(texts, reference, strict=True):
        given, wanted = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, right))
        wanted, given = [*wanted, None], [*given, None]  # the end counts too
        asked += len(wanted)
        equal += len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(given, wanted, strict=False))))
    return equal / asked


def summarise(rounds: list[dict[str, Any]], reference: list[str], tokenizer) -> dict[str, float | None]:
    """The best of all rounds: the median of the questions' first tokens, and of all times between tokens."""
    firsts = [statistics.median(first for _, first, _ in each["answers"][1:]) for each in rounds]
    gaps = [[gap for *_, row in each["answers"][1:] for gap in row] for each in rounds]
    return {
        "first token": min(firsts),
        "tokens/s": max(1 / statistics.median(each) for each in gaps) if all(gaps) else None,
        "batch": max((each["batch"] for each in rounds if "batch" in each), default=None),
        "memory": min(each["memory"] for each in rounds),
        "equal": equal_share([text for text, *_ in rounds[0]["answers"]], reference, tokenizer),
    }


def table(results: dict[str, dict[str, Any]], limits: dict[str, float]) -> str:
    base = results.get("stock LLaVA, float32") or results[REFERENCE]

    def rate(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.0f} ({row[name] / base[name]:.1f} x)" if row[name] and base[name] else "–"

    lines = [
        "| engine | tokens/s | of its limit | first token | 16 at once, tokens/s | size | memory | equal |",
        "|---" * 8 + "|",
    ]
    for name, row in results.items():
        limit = limits["read bytes/s"] / (limits["weights of a token"] * row["bits"] / 8)
        cells = [name, rate(row, "tokens/s"), f"{row['tokens/s'] / limit:.0%}" if row["tokens/s"] else "–"]
        cells += [f"{row['first token']:.3f} s ({base['first token'] / row['first token']:.1f} x)", rate(row, "batch")]
        memory = "–" if "Chromium" in name else f"{row['memory'] / 1e9:.2f} GB"  # a browser is many processes
        cells += [f"{row['size'] / 1e6:.1f} MB", memory, f"{row['equal']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{name}: {value:.3g}" for name, value in limits.items())])


def draw(results: dict[str, dict[str, Any]], limits: dict[str, float], path: Path) -> None:
    """Bars: tokens a second, with a mark where reading the weights would be all, and time to the first token."""
    from matplotlib.figure import Figure

    names = list(results)[::-1]
    engines = list(dict.fromkeys(name.split(",")[0] for name in results))
    colours = [f"C{engines.index(name.split(',')[0])}" for name in names]
    figure = Figure(figsize=(10, 0.3 * len(names) + 1.2), layout="constrained")
    rate, first = figure.subplots(1, 2, sharey=True)
    rate.barh(names, [results[name]["tokens/s"] or 0 for name in names], color=colours)
    floors = [limits["read bytes/s"] / (limits["weights of a token"] * results[name]["bits"] / 8) for name in names]
    rate.plot(floors, names, "|", color="black", markersize=10, label="reading the weights alone")
    rate.set_xlabel("tokens/s of one answer (more is better)")
    rate.legend(loc="lower right", fontsize="small")
    first.barh(names, [1000 * results[name]["first token"] for name in names], color=colours)
    least = 1000 * limits["FLOPs to the first token"] / limits["float32 FLOP/s"]
    first.axvline(least, color="black", linestyle=":", label="float32 products alone")
    first.set_xlabel("ms to the first token, image included (less is better)")
    first.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model (default: MiniMind2-V small with random weights)")
    parser.add_argument("--data", type=Path, help="JSONL of questions; with --model")
    parser.add_argument("--images", type=Path, help="folder of their images; with --model")
    parser.add_argument("--engines", nargs="+", help="which to measure, by engine (default: all)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer at most (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns, of which the best counts (default: %(default)s)")
    parser.add_argument("--vllm", help="interpreter of an environment with vLLM")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-engines"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    folder, everyone = arguments.output, contestants(arguments.vllm)
    if (arguments.model is None) != (arguments.data is None) or (arguments.data is None) != (arguments.images is None):
        parser.error("--model, --data and --images belong together")
    if unknown := set(arguments.engines or ()) - {each.engine for each in everyone}:
        parser.error(
            f"no engine {', '.join(sorted(unknown))}: expected some of {', '.join({each.engine: 0 for each in everyone})}"
        )
    chosen = [each for each in everyone if each.engine in {"transformers", *(arguments.engines or [each.engine])}]
    for each in chosen:
        if missing := each.missing():
            print(f"Left out: {each.name}, for want of {', '.join(missing)}", file=sys.stderr)
    chosen = [each for each in chosen if not each.missing()]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    refused = prepare(arguments, folder, {each.engine for each in chosen})
    chosen = [each for each in chosen if each.engine not in refused]
    subprocess.run([sys.executable, RUNS, str(folder), "limits", "", "0"], check=True)
    limits = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rounds: dict[str, list[dict[str, Any]]] = {each.name: [] for each in chosen}
    for turn, contestant in itertools.product(range(arguments.rounds), chosen):
        print(f"Turn {turn + 1} of {arguments.rounds}: {contestant.name}", file=sys.stderr, flush=True)
        if result := run_once(contestant, arguments, folder):
            rounds[contestant.name].append(result)

    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    reference = [text for text, *_ in rounds[REFERENCE][0]["answers"]]
    results = {
        each.name: summarise(rounds[each.name], reference, tokenizer) | {"size": size_on_disk(folder, each), "bits": each.bits}
        for each in chosen
        if rounds[each.name]
    }
    about = {"machine": processor_name(), "threads": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    about |= {"transformers": transformers.__version__, "model": str(arguments.model or "MiniMind2-V small, random weights")}
    saved = {"about": about, "limits": limits, "results": results}
    (folder / "results.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    print(table(results, limits))
    draw(results, limits, folder / "engines.png")
    print(f"\nDrawn in {folder / 'engines.png'}")


def processor_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
