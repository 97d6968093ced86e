"""The one table of weight names: native MiniMind-V on one side, this package on the other, read in both directions.

A row says which native tensors make up one of ours, and how. Each `Transform` can be undone bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from ..configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig


Generation = Literal["minimind2-2025-02", "minimind2", "minimind-3"]
"""How the native file names its tensors: the first MiniMind2-V, MiniMind2-V since April 2025, or minimind-3v."""


class Transform(Protocol):
    """Makes one tensor of ours from native ones, and the native ones from ours."""

    def from_native(self, tensors: list[torch.Tensor]) -> torch.Tensor: ...

    def to_native(self, tensor: torch.Tensor, count: int) -> list[torch.Tensor]: ...


class Copy:
    """The tensor as it is."""

    def from_native(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0]

    def to_native(self, tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
        return [tensor]


@dataclass(frozen=True)
class Concatenate:
    """Native tensors joined along a dimension: the shared experts, side by side in one wider block."""

    dim: int

    def from_native(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(tensors, dim=self.dim)

    def to_native(self, tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
        return list(tensor.chunk(count, dim=self.dim))


@dataclass(frozen=True)
class StackExperts:
    """One 3-D tensor (experts, parts * rows, columns) from the parts of each expert in turn, say gate and up."""

    num_experts: int

    def from_native(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tensors).reshape(self.num_experts, -1, tensors[0].shape[-1])

    def to_native(self, tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
        return list(tensor.reshape(count, -1, tensor.shape[-1]).unbind())


@dataclass(frozen=True)
class HalfRotation:
    """Rows of wq and wk, reordered from interleaved RoPE pairs (2i, 2i+1) to pairs (i, i + head_dim/2)."""

    num_heads: int

    def from_native(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        rows, columns = tensors[0].shape
        return tensors[0].reshape(self.num_heads, -1, 2, columns).transpose(1, 2).reshape(rows, columns)

    def to_native(self, tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
        rows, columns = tensor.shape
        return [tensor.reshape(self.num_heads, 2, -1, columns).transpose(1, 2).reshape(rows, columns)]


class Row(NamedTuple):
    """One of our tensors, the native ones that it is made of, and how."""

    ours: str
    native: list[str]
    transform: Transform


# Ours, native, native of February 2025. {i} is a layer, {e} an expert.
_TOP = [
    ("embed_tokens.weight", "model.embed_tokens.weight", "tok_embeddings.weight"),
    ("norm.weight", "model.norm.weight", "norm.weight"),
]
_LAYER = [
    ("input_layernorm.weight", "input_layernorm.weight", "attention_norm.weight"),
    ("self_attn.q_proj.weight", "self_attn.q_proj.weight", "attention.wq.weight"),
    ("self_attn.k_proj.weight", "self_attn.k_proj.weight", "attention.wk.weight"),
    ("self_attn.v_proj.weight", "self_attn.v_proj.weight", "attention.wv.weight"),
    ("self_attn.o_proj.weight", "self_attn.o_proj.weight", "attention.wo.weight"),
    ("post_attention_layernorm.weight", "post_attention_layernorm.weight", "ffn_norm.weight"),
]
_QK_NORM = [
    ("self_attn.q_norm.weight", "self_attn.q_norm.weight", None),
    ("self_attn.k_norm.weight", "self_attn.k_norm.weight", None),
]
_FEED_FORWARD = [
    ("gate_proj.weight", "gate_proj.weight", "w1.weight"),
    ("up_proj.weight", "up_proj.weight", "w3.weight"),
    ("down_proj.weight", "down_proj.weight", "w2.weight"),
]
# By (layer norm, number of linear layers, patches merged)
_PROJECTOR = {
    (False, 1): {"linear_1": "vision_proj.vision_proj.0"},
    (False, 2): {"linear_1": "vision_proj.mlp.0", "linear_2": "vision_proj.mlp.2"},
    (True, 2): {"norm": "vision_proj.mlp.0", "linear_1": "vision_proj.mlp.1", "linear_2": "vision_proj.mlp.3"},
}


def key_table(config: MiniMindVConfig | MiniMindVTextConfig, generation: Generation) -> list[Row]:
    """Every tensor of a model of ours but the image encoder's, which native files leave out.

    Args:
        config: of MiniMindVForConditionalGeneration, or of MiniMindForCausalLM (native `llm_*.pth`).
        generation: how the native file names its tensors.

    Raises:
        ValueError: native MiniMind-V has no projector like this one.
    """
    text = config.get_text_config()
    first = generation == "minimind2-2025-02"
    decoder = "model.language_model." if isinstance(config, MiniMindVConfig) else "model."
    copy = Copy()

    def native(names: tuple) -> str:
        return names[2] if first else names[1]

    rows = [Row(decoder + names[0], [native(names)], copy) for names in _TOP]
    rows.append(Row("lm_head.weight", ["output.weight" if first else "lm_head.weight"], copy))
    for i in range(text.num_hidden_layers):
        ours, theirs = f"{decoder}layers.{i}.", f"layers.{i}." if first else f"model.layers.{i}."
        for names in _LAYER + (_QK_NORM if text.use_qk_norm else []):
            heads = {"self_attn.q_proj.weight": text.num_attention_heads, "self_attn.k_proj.weight": text.num_key_value_heads}
            transform = HalfRotation(heads[names[0]]) if first and names[0] in heads else copy
            rows.append(Row(ours + names[0], [theirs + native(names)], transform))
        ours, theirs = ours + "mlp.", theirs + ("feed_forward." if first else "mlp.")
        gate, up, down = (native(names) for names in _FEED_FORWARD)
        if not text.num_experts:
            rows += [Row(ours + names[0], [theirs + native(names)], copy) for names in _FEED_FORWARD]
            continue
        experts = [f"{theirs}experts.{e}." for e in range(text.num_experts)]
        stack = StackExperts(text.num_experts)
        rows.append(Row(ours + "gate.weight", [theirs + "gate.weight"], copy))
        rows.append(Row(ours + "experts.gate_up_proj", [e + part for e in experts for part in (gate, up)], stack))
        rows.append(Row(ours + "experts.down_proj", [e + down for e in experts], stack))
        if text.num_shared_experts:
            shared = [theirs + "shared_experts."]
            if not first:
                shared = [f"{shared[0]}{n}." for n in range(text.num_shared_experts)]
            for names in _FEED_FORWARD:
                dim = 1 if names[0] == "down_proj.weight" else 0
                parts = [prefix + native(names) for prefix in shared]
                rows.append(Row(f"{ours}shared_experts.{names[0]}", parts, Concatenate(dim)))
    if isinstance(config, MiniMindVConfig):
        rows += _projector_rows(config)
    return rows


def _projector_rows(config: MiniMindVConfig) -> list[Row]:
    kind = (config.projector_layer_norm, config.projector_num_layers)
    if kind not in _PROJECTOR:
        raise ValueError(
            f"projector_layer_norm={kind[0]}, projector_num_layers={kind[1]}: native MiniMind-V has no such projector; "
            f"it has {', '.join(map(str, _PROJECTOR))}."
        )
    rows = []
    for ours, native in _PROJECTOR[kind].items():
        has_bias = ours == "norm" or config.multimodal_projector_bias
        for part in ("weight", "bias") if has_bias else ("weight",):
            rows.append(Row(f"model.multi_modal_projector.{ours}.{part}", [f"{native}.{part}"], Copy()))
    return rows


def from_native(state_dict: Mapping[str, torch.Tensor], table: list[Row]) -> dict[str, torch.Tensor]:
    """Our tensors from native ones. Raises KeyError where a native one is missing."""
    return {row.ours: row.transform.from_native([state_dict[name] for name in row.native]) for row in table}


def to_native(state_dict: Mapping[str, torch.Tensor], table: list[Row]) -> dict[str, torch.Tensor]:
    """Native tensors from ours. Raises KeyError where one of ours is missing."""
    return {
        name: tensor
        for row in table
        for name, tensor in zip(row.native, row.transform.to_native(state_dict[row.ours], len(row.native)), strict=True)
    }
