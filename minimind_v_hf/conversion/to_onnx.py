"""A model folder to ONNX graphs in the layout of transformers.js, each compared with the model."""

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlavaConfig, PreTrainedModel, Qwen3Config

from ..configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig
from ..model_card import model_card, table
from ..onnx_model import GRAPHS, graph_file
from ..preparation import rebuild_chat_template
from ..processing_minimind_v import MiniMindVProcessor
from .folders import check_output, new_folder, read_model_folder, read_processor
from .onnx_comparison import Comparison, Report
from .onnx_graphs import write_graphs
from .report import ConversionError, print_table, warn
from .to_llava import SHARED_FIELDS


PRECISIONS = {
    "fp32": "float32",
    "fp16": "float16",
    "q8": "matrices in 8 bits, with a scale for each column; for WASM, which has no fast 4-bit kernels",
    "q4": "matrices in 4 bits, with a scale for each 32 numbers; the fastest on a CPU",
    "q4f16": "the same, and the rest in float16; for WebGPU",
}
PREFERRED = {"cpu": ("q4", "q8", "fp32", "fp16"), "wasm": ("q8", "fp32", "q4"), "webgpu": ("q4", "fp32", "q8")}
"""Which precision is for which device, the fastest first."""


def convert(
    model: str | Path,
    output: str | Path,
    *,
    dtype: Sequence[str] = ("fp32", "q8", "q4"),
    images: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> None:
    """Write the graphs in each precision, and compare their answers with the model's.

    Args:
        model: folder of a MiniMind-V of this package.
        output: the folder to write.
        dtype: of `PRECISIONS`.
        images: files of images to ask about in the comparison; by default four are drawn.
        overwrite: replace a model folder that is there already.

    Raises:
        ConversionError: the model cannot be exported, its folder is damaged, or the float32 graphs answer otherwise than the
            model. Nothing is written then.
    """
    require_packages()
    folder, output = Path(model), Path(output)
    check_output(output, overwrite, [folder])
    dtypes = [name for name in PRECISIONS if name in dtype]
    ours = read_model_folder(folder)
    config = ours.config
    check_exportable(folder, config)
    ours = ours.float().eval().requires_grad_(False)
    processor, ours.generation_config = read_processor(folder, config)
    use_simple_template(processor, folder)
    comparison = Comparison(ours, processor, images)

    with new_folder(output) as staging, _quietly():
        write_processor(processor, config, staging)
        write_config(config, staging)
        ours.generation_config.save_pretrained(staging)
        write_graphs(ours, staging, dtypes)
        reports = [comparison.report(staging, name) for name in dict.fromkeys(["fp32", *dtypes])]
        reports = [report for report in reports if report.dtype in dtypes]
        for graph in () if "fp32" in dtypes else GRAPHS:
            graph_file(staging, graph, "fp32").unlink()
        write_config(config, staging, reports)
        text = card(output.name, folder.name, ours, comparison, reports)
        (staging / "README.md").write_text(text, encoding="utf-8")
    print_table(
        f"{folder} in ONNX", [("precision", "size", "equal tokens", "log-probabilities differ by"), *map(Report.row, reports)]
    )
    for report in reports:
        if not report.is_good:
            warn(report.warning)
    print(f"\nWritten to {output}")


def require_packages() -> None:
    """Raises ConversionError where a package that exporting needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConversionError(f'exporting needs {error.name}: pip install -e ".[onnx]"') from None


def check_exportable(folder: Path, config: MiniMindVConfig | MiniMindVTextConfig) -> None:
    """Raises ConversionError for a model that these graphs cannot hold."""
    if not isinstance(config, MiniMindVConfig):
        raise ConversionError(
            f"{folder} is a language model without images: make it a stock one with convert/to_llava.py, which other "
            "exporters know"
        )
    rope = config.text_config.rope_parameters["rope_type"]
    if rope in ("dynamic", "longrope"):
        raise ConversionError(
            f"{folder} has the position embedding {rope!r}, whose frequencies change with the length of a text"
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter and the quantisers say of themselves."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# ── The other files ──────────────────────────────────────────────────────────────────────────────────────────────────


def use_simple_template(processor: MiniMindVProcessor, folder: Path) -> None:
    """Give a processor a chat template that transformers.js can read, or warn where it has one of its own."""
    # Templates that an earlier version of this package wrote use what the Jinja of transformers.js does not know
    if template := rebuild_chat_template(processor.chat_template):
        processor.chat_template = template
    else:
        warn(f"{folder} has a chat template of its own: whether transformers.js can read it was not tried")


def write_processor(processor: MiniMindVProcessor, config: MiniMindVConfig, folder: Path) -> None:
    """Write the files of our processor, with what transformers.js wants to find in them."""
    processor.save_pretrained(folder)
    _update(folder / "tokenizer_config.json", chat_template=processor.chat_template)
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2  # by which its LlavaProcessor counts
    _update(
        folder / "processor_config.json",
        patch_size=vision.patch_size,
        image_token=processor.image_token,
        num_additional_image_tokens=config.image_seq_length - patches,
    )
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    settings.pop("auto_map", None)
    settings["image_processor_type"] = re.sub("(Fast|Pil)$", "", settings["image_processor_type"])
    (folder / "preprocessor_config.json").write_text("{}")
    _update(folder / "preprocessor_config.json", **settings, processor_class="LlavaProcessor")


def _update(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_config(config: MiniMindVConfig, folder: Path, reports: Sequence[Report] = ()) -> None:
    """Write config.json: a LLaVA, whose decoder tells the shape of the cache; and which precision is for which device."""
    text = config.text_config
    stock = Qwen3Config if text.use_qk_norm else LlamaConfig
    llava = LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        text_config=stock(**{field: getattr(text, field) for field in SHARED_FIELDS}),
        vision_config=config.vision_config,
        image_token_index=config.image_token_id,
        image_seq_length=config.image_seq_length,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    llava.save_pretrained(folder)
    if reports:
        best = {device: best_precision(reports, names) for device, names in PREFERRED.items()}
        choices = {"dtype": best.pop("cpu"), "device_config": {device: {"dtype": name} for device, name in best.items()}}
        _update(folder / "config.json", **{"transformers.js_config": choices})


def best_precision(reports: Sequence[Report], preferred: Sequence[str]) -> str:
    """The first of the preferred precisions that answers well; where none does, the one that answers best."""
    good = {report.dtype for report in reports if report.is_good}
    return next((name for name in preferred if name in good), max(reports, key=lambda report: report.equal).dtype)


# ── The model card ───────────────────────────────────────────────────────────────────────────────────────────────────


_USE = """\
In Python, with the package [minimind_v_hf](https://github.com/jingyaogong/minimind-v) and `onnxruntime`:

```python
from minimind_v_hf import MiniMindVOnnxModel, MiniMindVProcessor

model = MiniMindVOnnxModel.from_pretrained("{name}", dtype="{best}")
processor = MiniMindVProcessor.from_pretrained("{name}")
```

In JavaScript:

```js
import {{ AutoProcessor, LlavaForConditionalGeneration, load_image }} from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained("{name}");
const model = await LlavaForConditionalGeneration.from_pretrained("{name}");
const question = [{{ role: "user", content: [{{ type: "image" }}, {{ type: "text", text: "\\n描述一下这个图像的内容。" }}] }}];
const prompt = processor.apply_chat_template(question, {{ add_generation_prompt: true }});
const inputs = await processor(await load_image("photo.jpg"), prompt, {{ add_special_tokens: false }});
const output = await model.generate({{ ...inputs, max_new_tokens: 128 }});
```"""


def card(name: str, source: str, model: PreTrainedModel, comparison: Comparison, reports: Sequence[Report]) -> str:
    """The text of README.md."""
    header = ("precision", "size", "equal tokens", "largest difference", "what it is")
    precisions = table([(*report.row(), PRECISIONS[report.dtype]) for report in reports], header)
    precisions += (
        "\n\nCompared with the model in float32, in PyTorch, on its greedy answers to questions about "
        f"{comparison.source} images: the share of their tokens that are the likeliest here too, and the largest difference of "
        "their log-probabilities."
    )
    precisions += "".join(f"\n\n**{report.warning}.**" for report in reports if not report.is_good)
    summary = f"{source} in ONNX, for transformers.js and ONNX Runtime."
    use = _USE.format(name=name, best=best_precision(reports, PREFERRED["cpu"]))
    return model_card(name, model, summary, {"Precisions": precisions}, use=use, library_name="transformers.js")
