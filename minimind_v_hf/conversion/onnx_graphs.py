"""The three graphs of a MiniMind-V in ONNX.

`vision_encoder` makes vectors of images, `embed_tokens` of token ids, and `decoder_model_merged` reads vectors and a cache and
gives logits and a longer cache. The decoder is written down here in ONNX's own operators for attention, rotary embedding and
RMSNorm (opset 23): a third of the nodes that tracing the model gives, and each token pays for every node.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_minimind import MiniMindExperts, MiniMindMLP
from ..onnx_model import graph_file


if TYPE_CHECKING:
    import onnx


OPSET = 23


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
            chosen = top_k_index == number  # (B*T, A)
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
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],  # (B, K, S - T, W), in the dtype of the weights
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The logits (B, kept, V), float32, and the cache with the new tokens."""
        tokens, total = inputs_embeds.shape[1], attention_mask.shape[1]
        positions = torch.arange(total)
        causal = positions[None] <= (positions[total - tokens :])[:, None]  # (T, S)
        mask = (causal[None] & (attention_mask[:, None] != 0))[:, None]  # (B, 1, T, S)

        hidden_states = inputs_embeds.to(self.lm_head.weight.dtype)
        rotary = self.decoder.rotary_emb
        angles = position_ids[..., None].float() * rotary.inv_freq  # (B, T, W/2)
        cos = (angles.cos() * rotary.attention_scaling).to(hidden_states.dtype)
        sin = (angles.sin() * rotary.attention_scaling).to(hidden_states.dtype)

        present = []
        for layer, qkv_proj, past in zip(self.decoder.layers, self.qkv_proj, past_key_values, strict=True):
            attention = layer.self_attn
            width = attention.head_dim
            heads, kv_heads = attention.q_proj.out_features // width, attention.k_proj.out_features // width
            qkv = qkv_proj(layer.input_layernorm(hidden_states))
            sizes = [heads * width, kv_heads * width, kv_heads * width]
            query, key, value = qkv.split(sizes, dim=-1)  # (B, T, H*W), twice (B, T, K*W)
            query, key = self._normed(attention.q_norm, query, width), self._normed(attention.k_norm, key, width)
            query = torch.onnx.ops.rotary_embedding(query, cos, sin, num_heads=heads)
            key = torch.onnx.ops.rotary_embedding(key, cos, sin, num_heads=kv_heads)
            output, key, value, _ = torch.onnx.ops.attention(
                query, key, value, mask, *past, scale=attention.scaling, q_num_heads=heads, kv_num_heads=kv_heads
            )  # (B, T, H*W), twice (B, K, S, W)
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
    program: Any = torch.onnx.export(
        graph.module.eval(),
        kwargs=graph.samples,
        dynamo=True,
        dynamic_shapes=graph.axes,
        input_names=graph.inputs,
        output_names=graph.outputs,
        opset_version=OPSET,
        verbose=False,
    )
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
