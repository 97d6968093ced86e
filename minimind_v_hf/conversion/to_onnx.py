"""A model folder to ONNX graphs in the layout of transformers.js, each compared with the model.

`vision_encoder` makes vectors of images, `embed_tokens` of token ids, and `decoder_model_merged` reads vectors and a cache and
gives logits and a longer cache. The decoder is written down here in ONNX's own operators for attention, rotary embedding and
RMSNorm (opset 23): a third of the nodes that tracing the model gives, and each token pays for every node.
"""

import contextlib
import json
import logging
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlavaConfig, PreTrainedModel, Qwen3Config

from ..chat import encode_questions
from ..configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig
from ..data.images import read_image
from ..model_card import table
from ..modeling_minimind import MiniMindExperts, MiniMindMLP
from ..onnx_model import GRAPHS, MiniMindVOnnxModel, graph_file
from ..preparation import build_chat_template
from ..processing_minimind_v import MiniMindVProcessor
from ..shapes import all_scenes, draw, questions
from .folders import check_output, new_folder, read_model_folder
from .report import ConversionError, explained, print_table, warn
from .to_llava import SHARED_FIELDS


if TYPE_CHECKING:
    import onnx


OPSET = 23
PRECISIONS = {
    "fp32": "float32",
    "fp16": "float16",
    "q8": "matrices in 8 bits, with a scale for each column; for WASM, which has no fast 4-bit kernels",
    "q4": "matrices in 4 bits, with a scale for each 32 numbers; the fastest on a CPU",
    "q4f16": "the same, and the rest in float16; for WebGPU",
}
PREFERRED = {"cpu": ("q4", "q8", "fp32", "fp16"), "wasm": ("q8", "fp32", "q4"), "webgpu": ("q4", "fp32", "q8")}
"""Which precision is for which device, the fastest first."""

NEW_TOKENS = 32
GOOD = 0.95  # of the greedy tokens that a precision should have in common with float32


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
        images: files of images to ask about in the comparison; by default some are drawn.
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
    processor, generation_config = read_processor(folder)
    if generation_config is not None:
        ours.generation_config = generation_config
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
        (staging / "README.md").write_text(model_card(output.name, folder.name, comparison, reports), encoding="utf-8")
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


# ── The graphs ───────────────────────────────────────────────────────────────────────────────────────────────────────


class VisionEncoder(nn.Module):
    """The encoder and the projector: float32 pixel values (N, 3, height, width) to float32 vectors (N, P, D)."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values).pooler_output.float()


class EmbedTokens(nn.Module):
    """Token ids (B, T) to float32 vectors (B, T, D)."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.embed_tokens: nn.Module = model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids).float()


class Int8EmbedTokens(nn.Module):
    """`EmbedTokens` with one int8 per weight and one scale per token (symmetric, round to nearest)."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        weight = model.get_input_embeddings().weight.detach().float()
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)
        self.weight = nn.Buffer((weight / scale).round().to(torch.int8))
        self.scale = nn.Buffer(scale)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.weight[input_ids].float() * self.scale[input_ids]


def _linear(*weights: torch.Tensor) -> nn.Linear:
    """A layer without bias whose outputs are those of several, one behind the other: fewer and larger products."""
    weight = torch.cat(weights).detach()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class FeedForward(nn.Module):
    """`MiniMindMLP`, or one expert, in two products."""

    def __init__(self, gate_up: list[torch.Tensor], down: torch.Tensor, act_fn: nn.Module):
        super().__init__()
        self.gate_up_proj = _linear(*gate_up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class Experts(nn.Module):
    """`MiniMindExperts` with a module for each expert, which reads the tokens that chose it and costs nothing without any."""

    def __init__(self, experts: MiniMindExperts):
        super().__init__()
        pairs = zip(experts.gate_up_proj, experts.down_proj, strict=True)
        self.experts = nn.ModuleList(FeedForward([gate_up], down, experts.act_fn) for gate_up, down in pairs)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden_states, dtype=torch.float)  # CPUs do not scatter float16
        for number, expert in enumerate(self.experts):
            chosen = top_k_index == number  # (B*T, k)
            (token,) = torch.where(chosen.any(dim=-1))
            weight = (top_k_weights * chosen).sum(dim=-1, keepdim=True).index_select(0, token)
            # With an axis in front: the exporter would make a Gemm of two, which quantisers pass over
            result = expert(hidden_states.index_select(0, token)[None])[0]
            output = output.index_add(0, token, (result * weight).float())
        return output.to(hidden_states.dtype)


class Decoder(nn.Module):
    """The decoder and its head: the computation of `MiniMindModel`, in operators of ONNX."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.decoder: Any = model.get_decoder()
        self.lm_head = model.lm_head
        attentions = [layer.self_attn for layer in self.decoder.layers]
        self.qkv_proj = nn.ModuleList(_linear(a.q_proj.weight, a.k_proj.weight, a.v_proj.weight) for a in attentions)

    def forward(
        self,
        inputs_embeds: torch.Tensor,  # (B, T, D), float32
        attention_mask: torch.Tensor,  # (B, S), int64: 0 for padding
        position_ids: torch.Tensor,  # (B, T), int64
        num_logits_to_keep: torch.Tensor,  # (), int64: of the last so many tokens; 0 of all
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],  # (B, K, S - T, d), in the dtype of the weights
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The logits (B, kept, V), float32, and the cache with the new tokens."""
        tokens, total = inputs_embeds.shape[1], attention_mask.shape[1]
        positions = torch.arange(total)
        causal = positions[None] <= (positions[total - tokens :])[:, None]  # (T, S)
        mask = (causal[None] & (attention_mask[:, None] != 0))[:, None]  # (B, 1, T, S)

        hidden_states = inputs_embeds.to(self.lm_head.weight.dtype)
        rotary = self.decoder.rotary_emb
        angles = position_ids[..., None].float() * rotary.inv_freq  # (B, T, d/2)
        cos = (angles.cos() * rotary.attention_scaling).to(hidden_states.dtype)
        sin = (angles.sin() * rotary.attention_scaling).to(hidden_states.dtype)

        present = []
        for layer, qkv_proj, past in zip(self.decoder.layers, self.qkv_proj, past_key_values, strict=True):
            attention = layer.self_attn
            d = attention.head_dim
            heads, kv_heads = attention.q_proj.out_features // d, attention.k_proj.out_features // d
            qkv = qkv_proj(layer.input_layernorm(hidden_states))
            query, key, value = qkv.split([heads * d, kv_heads * d, kv_heads * d], dim=-1)  # (B, T, H*d), twice (B, T, K*d)
            query, key = self._normed(attention.q_norm, query, d), self._normed(attention.k_norm, key, d)
            query = torch.onnx.ops.rotary_embedding(query, cos, sin, num_heads=heads)
            key = torch.onnx.ops.rotary_embedding(key, cos, sin, num_heads=kv_heads)
            output, key, value, _ = torch.onnx.ops.attention(
                query, key, value, mask, *past, scale=attention.scaling, q_num_heads=heads, kv_num_heads=kv_heads
            )  # (B, T, H*d), twice (B, K, S, d)
            present.append((key, value))
            hidden_states = hidden_states + attention.o_proj(output)
            hidden_states = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))

        hidden_states = self.decoder.norm(hidden_states)
        kept = torch.onnx.ops.symbolic(
            "Slice",
            (hidden_states, -num_logits_to_keep[None], torch.tensor([2**31 - 1]), torch.tensor([1])),
            dtype=hidden_states.dtype,
            # Any size that is known at run time alone will do: the graph gives it a name
            shape=(hidden_states.shape[0], num_logits_to_keep.item(), hidden_states.shape[2]),  # type: ignore[arg-type]
        )
        return self.lm_head(kept).float(), present

    @staticmethod
    def _normed(norm: nn.Module, states: torch.Tensor, head_dim: int) -> torch.Tensor:
        """Each head by itself, where the model has such a norm."""
        return states if isinstance(norm, nn.Identity) else norm(states.unflatten(-1, (-1, head_dim))).flatten(2)


@dataclass
class Graph:
    """A module to export: the samples of its inputs, their axes that vary, and the names of inputs and outputs."""

    module: nn.Module
    samples: dict[str, Any]
    axes: dict[str, Any]
    inputs: list[str]
    outputs: list[str]


def graphs(model: PreTrainedModel) -> dict[str, Graph]:
    """The three graphs of a model, in the dtype of its weights."""
    text, size, dtype = model.config.get_text_config(), model.config.vision_config.image_size, model.dtype
    # No axis that may vary has the size 1 here, which the tracer would take for a constant
    batch, new, past = 2, 3, 5
    tokens = {0: "batch_size", 1: "sequence_length"}
    shape = (batch, text.num_key_value_heads, past, text.head_dim)
    cached = {0: "batch_size", 2: "past_sequence_length"}  # the first by this name, which transformers.js knows
    layers = range(text.num_hidden_layers)
    # Each a tensor of its own: the tracer takes one that it meets again for the same input
    states = [(torch.rand(shape, dtype=dtype), torch.rand(shape, dtype=dtype)) for _ in layers]
    pairs = [f"{number}.{kind}" for number in layers for kind in ("key", "value")]
    decoder = {
        "inputs_embeds": (torch.rand(batch, new, text.hidden_size), tokens),
        "attention_mask": (torch.ones(batch, past + new, dtype=torch.long), {0: "batch_size", 1: "total_sequence_length"}),
        "position_ids": (torch.arange(new).repeat(batch, 1), tokens),
        "num_logits_to_keep": (torch.tensor(1), {}),
    }
    return {
        "vision_encoder": Graph(
            VisionEncoder(model),
            {"pixel_values": torch.rand(2, 3, size, size)},
            {"pixel_values": {0: "num_images"}},
            ["pixel_values"],
            ["image_features"],
        ),
        "embed_tokens": Graph(
            EmbedTokens(model),
            {"input_ids": torch.zeros(2, 3, dtype=torch.long)},
            {"input_ids": tokens},
            ["input_ids"],
            ["inputs_embeds"],
        ),
        "decoder_model_merged": Graph(
            Decoder(model),
            {name: sample for name, (sample, _) in decoder.items()} | {"past_key_values": states},
            {name: axes for name, (_, axes) in decoder.items()} | {"past_key_values": [(cached, cached) for _ in layers]},
            [*decoder, *(f"past_key_values.{pair}" for pair in pairs)],
            ["logits", *(f"present.{pair}" for pair in pairs)],
        ),
    }


def write_graphs(model: PreTrainedModel, folder: Path, dtypes: Sequence[str]) -> None:
    """Write the graphs, in float32 always, and in each precision that is asked for.

    Args:
        model: of no use afterwards.
        folder: gets the graphs, under `onnx/`.
        dtypes: of `PRECISIONS`.
    """
    import onnx

    (folder / "onnx").mkdir()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MiniMindMLP):
                gate_up = [child.gate_proj.weight, child.up_proj.weight]
                setattr(parent, name, FeedForward(gate_up, child.down_proj.weight, child.act_fn))
            elif isinstance(child, MiniMindExperts):
                setattr(parent, name, Experts(child))
    for base, below in (("fp32", ["q8", "q4"]), ("fp16", ["q4f16"])):
        derived = [name for name in below if name in dtypes]
        if base == "fp16":
            if base not in dtypes and not derived:
                continue
            for parameter in model.parameters():  # not the buffers: the frequencies of RoPE stay exact
                parameter.data = parameter.data.half()
        for name, graph in graphs(model).items():
            print(f"{name}: {', '.join((base, *derived))}", flush=True)
            proto = export(graph)
            if base == "fp32" or base in dtypes:
                onnx.save(proto, graph_file(folder, name, base))
            for dtype in derived:
                if (name, dtype) == ("embed_tokens", "q8"):  # ONNX Runtime's quantiser would have one scale for all tokens
                    quantized = export(replace(graph, module=Int8EmbedTokens(model)))
                else:
                    quantized = to_int8(proto) if dtype == "q8" else to_int4(proto, name == "embed_tokens")
                onnx.save(quantized, graph_file(folder, name, dtype))


def export(graph: Graph) -> "onnx.ModelProto":
    """Trace a module."""
    program = torch.onnx.export(
        graph.module.eval(),
        kwargs=graph.samples,
        dynamo=True,
        dynamic_shapes=graph.axes,
        input_names=graph.inputs,
        output_names=graph.outputs,
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None  # which it is for dynamo=False
    proto = program.model_proto
    for each in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        each.ClearField("metadata_props")  # where in the sources it comes from, at more length than the graph itself
    for node in proto.graph.node:
        node.ClearField("doc_string")
    return proto


def to_int8(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """Matrices in 8 bits, with a scale for each column; what they are multiplied with is rounded at run time."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as work:
        # Unsigned: sums of signed products overflow on x86 machines without VNNI
        options = {"weight_type": QuantType.QUInt8, "per_channel": True, "op_types_to_quantize": ["MatMul"]}
        quantize_dynamic(proto, Path(work, "graph.onnx"), **options)
        return onnx.load(Path(work, "graph.onnx"))


def to_int4(proto: "onnx.ModelProto", is_embedding: bool) -> "onnx.ModelProto":
    """Matrices in 4 bits, with a scale for each 32 numbers."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)  # the quantiser writes into what it is given
    kinds = ("Gather",) if is_embedding else ("MatMul",)
    quantizer = MatMulNBitsQuantizer(copy, block_size=32, is_symmetric=True, accuracy_level=4, op_types_to_quantize=kinds)
    quantizer.process()
    return quantizer.model.model


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


def read_processor(folder: Path) -> tuple[MiniMindVProcessor, GenerationConfig | None]:
    """The processor of a folder, with a chat template that transformers.js can read, and the settings of its answers.

    Raises:
        ConversionError: they are missing or damaged.
    """
    with explained(f"{folder}: its processor or generation_config.json cannot be read"):
        processor = MiniMindVProcessor.from_pretrained(folder)
        has_settings = (folder / "generation_config.json").is_file()
        generation_config = GenerationConfig.from_pretrained(folder) if has_settings else None
    # Templates that an earlier version of this package wrote use what the Jinja of transformers.js does not know
    settings = dict(re.findall(r"^\{%- set (\w+) = (.+?) -%\}$", processor.chat_template or "", re.MULTILINE)[:4])
    if list(settings) == ["image_token", "mark", "default_system", "thinking"]:
        del settings["mark"]
        values = {name: json.loads(value) for name, value in settings.items()}
        processor.chat_template = build_chat_template(**values | {"default_system": values["default_system"] or None})
    else:
        warn(f"{folder} has a chat template of its own: whether transformers.js can read it was not tried")
    return processor, generation_config


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


def write_config(config: MiniMindVConfig, folder: Path, reports: "Sequence[Report]" = ()) -> None:
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


def best_precision(reports: "Sequence[Report]", preferred: Sequence[str]) -> str:
    """The first of the preferred precisions that answers well; where none does, the one that answers best."""
    good = {report.dtype for report in reports if report.is_good}
    return next((name for name in preferred if name in good), max(reports, key=lambda report: report.equal).dtype)


# ── The comparison ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Report:
    """How a precision answers.

    Args:
        dtype: one of `PRECISIONS`.
        size: of its three graphs, in bytes.
        equal: share of the tokens of the model's greedy answers that are the likeliest in these graphs as well.
        difference: the largest difference between the log-probabilities of those tokens.
    """

    dtype: str
    size: int
    equal: float
    difference: float

    @property
    def is_good(self) -> bool:
        return self.equal >= GOOD

    @property
    def warning(self) -> str:
        return f"{self.dtype} answers badly: only {self.equal:.1%} of the greedy tokens are those of the model"

    def row(self) -> tuple[str, str, str, str]:
        """For a table."""
        return (self.dtype, f"{self.size / 1e6:.1f} MB", f"{self.equal:.1%}", f"{self.difference:.1e}")


class Comparison:
    """Prompts, the greedy answers of a model, and their log-probabilities; to hold graphs against.

    The prompts, with none, one and two images, are one batch, padded on the left.

    Args:
        model: in float32.
        processor: of the model.
        images: files of images to ask about; none: some are drawn.

    Raises:
        ConversionError: an image cannot be read.
    """

    def __init__(self, model: PreTrainedModel, processor: MiniMindVProcessor, images: Sequence[str | Path]):
        self.source = "given" if images else "drawn"
        self.image_token_id = processor.image_token_id
        rng = random.Random(0)
        scenes = rng.sample(all_scenes(), 4)
        try:
            shown = [read_image(str(path)) for path in images] or [draw(scene, rng) for scene in scenes]
        except ValueError as error:
            raise ConversionError(str(error)) from None
        asked = [questions(scene)[-1].text[number % 2] for number, scene in enumerate(scenes)]
        if images:
            asked = ["Describe the picture.", "描述一下这个图像的内容。"]
        sets = [[], *([image] for image in shown), [shown[0], shown[-1]]]
        contents = ["<image>" * len(some) + "\n" * bool(some) + asked[n % len(asked)] for n, some in enumerate(sets)]
        conversations = [[{"role": "user", "content": content}] for content in contents]
        self.inputs = encode_questions(processor, conversations, sets)
        print(f"The model answers {len(sets)} questions about {self.source} images", flush=True)
        self.prompt_length = self.inputs["input_ids"].shape[1]
        self.answers = self._generate(model)
        eos = model.generation_config.eos_token_id
        ended = torch.isin(self.answers, torch.tensor(eos if eos is not None else -1)).long()
        self.is_answer = ended.cumsum(dim=1) - ended == 0  # (B, T): up to the first end, which counts too
        self.log_probabilities = self._log_probabilities(model)

    def report(self, folder: Path, dtype: str) -> Report:
        """Hold the graphs of a precision against the model.

        Raises:
            ConversionError: in float32, the tokens differ.
        """
        model = MiniMindVOnnxModel.from_pretrained(folder, dtype)
        if dtype == "fp32":
            found = self._generate(model)
            if not torch.equal(found, self.answers):
                raise ConversionError(
                    f"the graphs answer otherwise than the model: {found.tolist()}, and the model {self.answers.tolist()}"
                )
        expected, found = self.log_probabilities, self._log_probabilities(model)
        equal = (found.argmax(-1) == self.answers)[self.is_answer].float().mean()
        taken = [each.gather(-1, self.answers[..., None])[..., 0][self.is_answer] for each in (expected, found)]
        size = sum(graph_file(folder, graph, dtype).stat().st_size for graph in GRAPHS)
        return Report(dtype, size, float(equal), float((taken[0] - taken[1]).abs().max()))

    def _generate(self, model: PreTrainedModel) -> torch.Tensor:
        # The folder's own settings may have penalties, which generate() would take over from it
        eos = model.generation_config.eos_token_id
        config = GenerationConfig(
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            suppress_tokens=[self.image_token_id],  # it would be read again without an image
        )
        before, model.generation_config = model.generation_config, config
        try:
            return model.generate(**self.inputs)[:, self.prompt_length :]
        finally:
            model.generation_config = before

    @torch.no_grad()
    def _log_probabilities(self, model: PreTrainedModel) -> torch.Tensor:
        """Of all tokens at each place of the answers, (B, T, V)."""
        input_ids = torch.cat((self.inputs["input_ids"], self.answers), dim=1)[:, :-1]
        mask = torch.cat((self.inputs["attention_mask"], torch.ones_like(self.answers)), dim=1)[:, :-1]
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            pixel_values=self.inputs["pixel_values"],
            logits_to_keep=self.answers.shape[1],
        ).logits
        logits[..., self.image_token_id] = -torch.inf
        return logits.log_softmax(-1)


# ── The model card ───────────────────────────────────────────────────────────────────────────────────────────────────


_CARD = """\
---
library_name: transformers.js
pipeline_tag: image-text-to-text
tags:
- minimind-v
- onnx
---

# {name}

{source} in ONNX, for transformers.js and ONNX Runtime.

## Use

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
const question = [{{ role: "user", content: [{{ type: "image" }}, {{ type: "text", text: "\n描述一下这个图像的内容。" }}] }}];
const prompt = processor.apply_chat_template(question, {{ add_generation_prompt: true }});
const inputs = await processor(await load_image("photo.jpg"), prompt, {{ add_special_tokens: false }});
const output = await model.generate({{ ...inputs, max_new_tokens: 128 }});
```

## Precisions

{precisions}

Compared with the model in float32, in PyTorch, on its greedy answers to questions about {shown} images: the share of their
tokens that are the likeliest here too, and the largest difference of their log-probabilities.{warnings}
"""


def model_card(name: str, source: str, comparison: Comparison, reports: Sequence[Report]) -> str:
    """The text of README.md."""
    header = ("precision", "size", "equal tokens", "largest difference", "what it is")
    warnings = [f"**{report.warning}.**" for report in reports if not report.is_good]
    return _CARD.format(
        name=name,
        source=source,
        best=best_precision(reports, PREFERRED["cpu"]),
        precisions=table([(*report.row(), PRECISIONS[report.dtype]) for report in reports], header),
        shown=comparison.source,
        warnings="".join(f"\n\n{warning}" for warning in warnings),
    )
