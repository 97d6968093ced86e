"""What engines.py runs in processes of their own: each engine answers questions, and tells when each token came.

    python benchmarks/engine_runs.py FOLDER ENGINE PRECISION TOKENS

The folder holds what engines.py wrote: the model, its exports, and questions.json. The result is written there.
"""

import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


BROWSER = Path(__file__).resolve().parents[1] / "examples" / "browser"
BATCH = 16


def measure_generate(folder: Path, engine: str, precision: str, questions: list[dict], tokens: int) -> dict[str, Any]:
    """What answers through transformers' `generate()`: transformers itself, stock LLaVA, and ONNX Runtime."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria

    from minimind_v_hf.onnx_model import MiniMindVOnnxModel
    from minimind_v_hf.processing_minimind_v import MiniMindVProcessor

    class Clock(StoppingCriteria):
        def __init__(self):
            self.times: list[float] = []

        def __call__(self, input_ids, scores, **kwargs):
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    device = "cuda" if torch.cuda.is_available() and engine != "ONNX Runtime" else "cpu"
    if engine == "ONNX Runtime":
        model: Any = MiniMindVOnnxModel.from_pretrained(folder / "onnx", dtype=precision)
        processor: Any = MiniMindVProcessor.from_pretrained(folder / "model")
    else:
        source = folder / ("llava" if engine == "stock LLaVA" else "model")
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).to(device).eval()
        processor = AutoProcessor.from_pretrained(source)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens}
    if "compiled" in engine:
        model.model.language_model.compile(fullgraph=True)
        options["cache_implementation"] = "static"

    def ask(*rows: dict) -> tuple[str, float, list[float]]:
        clock, start = Clock(), time.perf_counter()
        messages = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "path": row["image"]}, {"type": "text", "text": f"\n{row['text']}"}],
                }
            ]
            for row in rows
        ]
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(device, dtype)
        output = model.generate(**inputs, stopping_criteria=[clock], **options)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text, clock.times[0] - start, [after - before for before, after in itertools.pairwise(clock.times)]

    result: dict[str, Any] = {"answers": [ask(row) for row in questions]}
    if "compiled" not in engine:  # each size of batch would be compiled anew
        gaps = ask(*itertools.islice(itertools.cycle(questions), BATCH))[2]
        result["batch"] = BATCH * len(gaps) / sum(gaps)
    return result


def measure_llama_cpp(folder: Path, engine: str, precision: str, questions: list[dict], tokens: int) -> dict[str, Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    half = "F32" if precision == "f32" else "F16"
    params.model.path = str(folder / "gguf" / f"model-{precision.upper()}.gguf")
    params.mmproj.path = str(folder / "gguf" / f"mmproj-model-{half}.gguf")
    params.n_ctx, params.n_gpu_layers, params.mmproj_use_gpu = 2048, 0, False
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    server = xllamacpp.Server(params)

    def ask(row: dict) -> tuple[str, float, list[float]]:
        parts, times, start = [], [], time.perf_counter()
        url = "data:image/png;base64," + base64.b64encode(Path(row["image"]).read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"\n{row['text']}"}]
        request = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": tokens, "stream": True}

        def take(chunk) -> bool:
            for each in chunk if isinstance(chunk, list) else [chunk]:
                if text := each["choices"] and each["choices"][0]["delta"].get("content"):
                    parts.append(text)
                    times.append(time.perf_counter())
            return False

        server.handle_chat_completions(request | {"cache_prompt": False}, take)
        return "".join(parts), times[0] - start, [after - before for before, after in itertools.pairwise(times)]

    return {"answers": [ask(row) for row in questions]}


def measure_vllm(folder: Path, engine: str, precision: str, questions: list[dict], tokens: int) -> dict[str, Any]:
    """vLLM tells no times of single tokens here: the first is that of an answer of one token."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder / "model"),
        trust_remote_code=True,
        model_impl="transformers",
        dtype=precision,
        max_model_len=1024,
        max_num_seqs=BATCH,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        distributed_executor_backend="uni",
    )

    def ask(rows: list[dict], count: int) -> tuple[list, float]:
        start = time.perf_counter()
        content = [
            [{"type": "image_pil", "image_pil": Image.open(row["image"])}, {"type": "text", "text": f"\n{row['text']}"}]
            for row in rows
        ]
        messages = [[{"role": "user", "content": each}] for each in content]
        outputs = engine.chat(messages, SamplingParams(temperature=0, max_tokens=count), use_tqdm=False)
        return [output.outputs[0] for output in outputs], time.perf_counter() - start

    def ask_one(row: dict) -> tuple[str, float, list[float]]:
        _, first = ask([row], 1)
        [answer], whole = ask([row], tokens)
        later = len(answer.token_ids) - 1
        return answer.text, first, [(whole - first) / later] * later

    rows = list(itertools.islice(itertools.cycle(questions), BATCH))
    answers = [ask_one(row) for row in questions]
    _, first = ask(rows, 1)
    outputs, whole = ask(rows, tokens)
    later = sum(len(output.token_ids) - 1 for output in outputs)
    return {"answers": answers, "batch": later / (whole - first) if later else 0.0}


IN_THE_PAGE = """
async ({ questions, tokens }) => {
  const worker = new Worker("worker.js", { type: "module" });
  const next = (take) =>
    new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => {
        if (data.type === "failed" || data.type === "refused") reject(new Error(JSON.stringify(data)));
        take(data, resolve);
      };
    });
  await next((data, resolve) => data.type === "ready" && resolve());
  const answers = [];
  for (const { image, text } of questions) {
    const file = new File([await (await fetch(image)).blob()], "image.png", { type: "image/png" });
    const times = [];
    const start = performance.now();
    worker.postMessage({ type: "ask", id: 1, question: text, files: [file] });
    const answer = await next((data, resolve) => {
      if (data.type === "text") times.push(performance.now());
      if (times.length === tokens) worker.postMessage({ type: "stop" });
      if (data.type === "answered") resolve(data.text);
    });
    worker.postMessage({ type: "reset" });
    const gaps = times.slice(1).map((time, index) => (time - times[index]) / 1000);
    answers.push([answer, (times[0] - start) / 1000, gaps]);
  }
  return answers;
}
"""


def measure_browser(folder: Path, engine: str, precision: str, questions: list[dict], tokens: int) -> dict[str, Any]:
    """The worker of the page of examples/browser, without its surface."""
    from playwright.sync_api import sync_playwright

    rows = [
        {"image": "data:image/png;base64," + base64.b64encode(Path(row["image"]).read_bytes()).decode(), "text": row["text"]}
        for row in questions
    ]
    command = [
        sys.executable,
        str(BROWSER / "serve.py"),
        "--port",
        "0",
        "--model",
        str(folder / f"onnx-{precision}"),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split()[-1] if server.stdout else ""
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(f"{address}style.css")
            return {"answers": page.evaluate(IN_THE_PAGE, {"questions": rows, "tokens": tokens})}
    finally:
        server.terminate()


def measure_limits(folder: Path, engine: str, precision: str, questions: list[dict], tokens: int) -> dict[str, Any]:
    """What the machine can do, and what an answer costs at least."""
    import torch
    from torch.utils.benchmark import Timer
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import minimind_v_hf  # noqa: F401 (registers the Auto classes)
    from minimind_v_hf.hardware import has_fast_bf16, matmul_rate
    from minimind_v_hf.training import training_flops

    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval().requires_grad_(False)
    processor = AutoProcessor.from_pretrained(folder / "model")
    messages = [{"role": "user", "content": f"<image>\n{questions[0]['text']}"}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    prompt = len(processor.tokenizer(text)["input_ids"]) + model.config.image_seq_length - 1
    flops = training_flops(model)
    active = flops["token"] / 2 + model.lm_head.weight.numel()  # weights that a token passes through
    first = flops["image"] + prompt * flops["token"] + prompt * (prompt + 1) / 2 * flops["pair"] + flops["label"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    factors = {"a": torch.randn(8192, 8192, device=device), "b": torch.randn(8192, device=device)}  # more than a cache holds
    timer = Timer("a @ b", globals=factors, num_threads=torch.get_num_threads())
    reading = factors["a"].nbytes / min(timer.timeit(1).mean for _ in range(20))
    result = {"read bytes/s": reading, "weights of a token": active, "FLOPs to the first token": first}
    for dtype in (torch.float32, *[torch.bfloat16] * has_fast_bf16()):
        result[f"{str(dtype).split('.')[1]} FLOP/s"] = matmul_rate(device, dtype)
    return result


MEASURES = {
    "llama.cpp": measure_llama_cpp,
    "vLLM": measure_vllm,
    "transformers.js in Chromium": measure_browser,
    "limits": measure_limits,
}

if __name__ == "__main__":
    folder, engine, precision = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    result = MEASURES.get(engine, measure_generate)(folder, engine, precision, questions, int(sys.argv[4]))
    result["memory"] = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # the most, in bytes
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
