"""What a native file holds, read from the names and shapes of its tensors.

Sizes come from the embedding and from layer 0; the audit finds the tensors that differ from them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig
from .key_table import Generation, key_table
from .report import ConversionError, explained


RELEASES: dict[Generation, str] = {
    "minimind2-2025-02": "MiniMind2-V of February 2025",
    "minimind2": "MiniMind2-V",
    "minimind-3": "minimind-3v",
}
IMAGE_TOKENS: dict[Generation, int] = {"minimind2-2025-02": 196, "minimind2": 196, "minimind-3": 64}
"""Image tokens that the released models were trained with."""

DEFAULT_HEADS = 8  # in every release

# What no tensor tells, as published
_PUBLISHED = {"num_attention_heads": DEFAULT_HEADS, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
_PUBLISHED_OF_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01, "seq_aux": True, "norm_topk_prob": True}
_PUBLISHED_OTHERWISE: dict[Generation, dict[str, Any]] = {
    "minimind2-2025-02": {"router_aux_loss_coef": 0.1},
    "minimind2": {},
    "minimind-3": {"rms_norm_eps": 1e-6, "num_experts_per_tok": 1, "router_aux_loss_coef": 5e-4, "seq_aux": False},
}
_YARN = {"factor": 16, "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0}

# What is read of a native config.json, besides RoPE
_NATIVE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("num_experts_per_tok", "norm_topk_prob", "seq_aux", "router_aux_loss_coef", "rms_norm_eps", "hidden_act"),
    *("max_position_embeddings", "tie_word_embeddings"),
)
FIRST_NAMES = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
    "router_aux_loss_coef": "aux_loss_alpha",
}
"""Fields of our configuration, and what the first MiniMind2-V calls them."""


class Architecture(NamedTuple):
    """A native model."""

    generation: Generation
    config: MiniMindVConfig | MiniMindVTextConfig
    """Ours. Of the whole model, or of the language model where no encoder was given."""
    has_projector: bool
    heads_are_assumed: bool
    """Nothing tells the number of heads, so it is that of the releases."""
    rows: list[tuple[str, object, str]]
    """Field, value, and where that is from, for the table that the user reads."""


def detect(
    shapes: Mapping[str, tuple[int, ...]],
    native_config: Mapping[str, Any],
    options: Mapping[str, Any],
    vision_config: PreTrainedConfig | None = None,
    image_token_id: int | None = None,
) -> Architecture:
    """Read the architecture. Raises ConversionError where what is given contradicts itself, or no such model can be.

    Args:
        shapes: of all tensors, by native name.
        native_config: config.json of a native folder, or an empty dict.
        options: what the user tells of the language model, by the fields of our configuration, or None; `vocab_size` is
            the tokenizer's.
        vision_config, image_token_id: of the encoder and of the tokenizer; None for a language model alone.
    """
    generation = detect_generation(shapes)
    # Field: (value, where it is from)
    native = {name: native_config.get(name, native_config.get(FIRST_NAMES.get(name, name))) for name in _NATIVE_FIELDS}
    known = {name: (value, "config.json") for name, value in native.items() if value is not None}
    known |= {name: (value, _flag(name)) for name, value in options.items() if value is not None}
    sizes = _sizes(shapes, generation, known.get("num_attention_heads", (DEFAULT_HEADS,))[0])
    for name, (value, source) in known.items():
        if sizes.get(name, value) != value:
            raise ConversionError(f"{source} says {name}={value}, but the weights have {sizes[name]}")
    published = _PUBLISHED | _PUBLISHED_OF_EXPERTS | _PUBLISHED_OTHERWISE[generation]
    known = {name: (value, "published default") for name, value in published.items()} | known
    known |= {name: (value, "weights") for name, value in sizes.items()}
    if not sizes["num_experts"]:
        if options.get("num_experts_per_tok") is not None:
            raise ConversionError("--num-experts-per-tok was given, but this is a dense model, without experts")
        known = {name: entry for name, entry in known.items() if name not in _PUBLISHED_OF_EXPERTS}
    rope = _rope(native_config, known["max_position_embeddings"][0])
    rows: list[tuple[str, object, str]] = [("release", RELEASES[generation], "weights")]
    rows += [(name, *entry) for name, entry in known.items()]
    source = "config.json" if native_config else "published default"
    rows.append(("rope_parameters", f"{rope['rope_type']}, base {rope['rope_theta']}", source))
    has_projector = any(name.startswith("vision_proj.") for name in shapes)
    with explained("MiniMind cannot be so"):
        values = {name: value for name, (value, _) in known.items()}
        config: MiniMindVConfig | MiniMindVTextConfig = MiniMindVTextConfig(**values, rope_parameters=rope)
        if vision_config is not None:
            projector = _projector(shapes, generation, vision_config.hidden_size)
            parts = {"text_config": config, "vision_config": vision_config, "image_token_id": image_token_id}
            config = MiniMindVConfig(**parts, **projector)
            source = "weights" if has_projector else "new: the file has none"
            rows += [(name, value, source) for name, value in projector.items()]
            rows.append(("vision_config", f"{vision_config.model_type}, {vision_config.image_size} px", "--vision-tower"))
            rows.append(("image_seq_length", config.image_seq_length, "--vision-tower"))
            rows.append(("image_token_id", image_token_id, "--tokenizer"))
    config.native_generation = generation  # for the way back
    heads_are_assumed = known["num_attention_heads"][1] == "published default"
    return Architecture(generation, config, has_projector, heads_are_assumed, rows)


def detect_generation(names: Iterable[str]) -> Generation:
    """How the decoder's tensors are named. Raises ConversionError where there is no MiniMind decoder."""
    names = list(names)
    first = sum(name.startswith(("tok_embeddings.", "layers.", "output.")) for name in names)
    later = sum(name.startswith(("model.layers.", "lm_head.")) for name in names)
    if first > later:
        return "minimind2-2025-02"
    if later:
        return "minimind-3" if any(name.endswith("self_attn.q_norm.weight") for name in names) else "minimind2"
    raise ConversionError(
        f"no MiniMind language model is in this file: its tensors are {', '.join(names[:3])}, …, where model.layers or layers "
        "were expected. Of a wrapped or adapted model, save the whole model inside"
    )


def _flag(name: str) -> str:
    return "--tokenizer" if name == "vocab_size" else f"--{name.replace('_', '-')}"


def _sizes(shapes: Mapping[str, tuple[int, ...]], generation: Generation, heads: int) -> dict[str, Any]:
    """The fields of our configuration that tensors tell; `heads` of queries, where no q/k norm tells how wide one is."""

    def count(pattern: str) -> int:
        return len({match[1] for name in shapes if (match := re.search(pattern, name))})

    experts = count(r"\.experts\.(\d+)\.")
    # The first MiniMind2-V has one shared expert, without a number
    shared = count(r"\.shared_experts\.(\d+)\.") or count(r"\.(shared_experts)\.")
    is_3 = generation == "minimind-3"
    layer = MiniMindVTextConfig(num_hidden_layers=1, num_experts=experts, num_experts_per_tok=1, use_qk_norm=is_3)
    native = {row.ours.removeprefix("model.layers.0."): row.native[0] for row in key_table(layer, generation)}

    def rows_of(ours: str) -> int:
        if not shapes.get(native[ours]):
            raise ConversionError(f"this is no complete MiniMind model: it has no tensor {native[ours]}")
        return shapes[native[ours]][0]

    def split(projection: str, by: int, parts: str) -> int:
        rows = rows_of(f"self_attn.{projection}.weight")
        if by < 1 or rows < by or rows % by:
            raise ConversionError(
                f"{rows} rows of {projection} do not split into {parts}: pass the right --num-attention-heads"
            )
        return rows // by

    head_dim = rows_of("self_attn.q_norm.weight") if is_3 else split("q_proj", heads, f"{heads} heads")
    return {
        "vocab_size": rows_of("lm_head.weight"),
        "hidden_size": rows_of("input_layernorm.weight"),
        "intermediate_size": rows_of("mlp.experts.gate_up_proj" if experts else "mlp.gate_proj.weight"),
        "num_hidden_layers": count(r"^(?:model\.)?layers\.(\d+)\."),
        "num_key_value_heads": split("k_proj", head_dim, f"heads of width {head_dim}"),
        "head_dim": head_dim,
        "use_qk_norm": is_3,
        "num_experts": experts,
        "num_shared_experts": shared,
        **({"num_attention_heads": split("q_proj", head_dim, f"heads of width {head_dim}")} if is_3 else {}),
    }


def _rope(native_config: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """RoPE's settings. Native MiniMind-V applies YaRN only beyond the length of its training."""
    rope = {"rope_type": "default", "rope_theta": native_config.get("rope_theta", MiniMindVTextConfig.default_theta)}
    scaling = native_config.get("rope_scaling") or {}
    yarn = _YARN | {name: value for name, value in scaling.items() if name in _YARN}
    if native_config.get("inference_rope_scaling") and longest > yarn["original_max_position_embeddings"]:
        rope |= {"rope_type": "yarn", **yarn}
    return rope


def _projector(shapes: Mapping[str, tuple[int, ...]], generation: Generation, width: int) -> dict[str, Any]:
    """The fields of our configuration that describe the projector: of the file, or of the release where it has none."""
    first = shapes.get("vision_proj.mlp.0.weight")
    if first is None:
        is_3 = generation == "minimind-3" and "vision_proj.vision_proj.0.weight" not in shapes
        return {"projector_num_layers": 2 if is_3 else 1, "projector_layer_norm": is_3}
    joined = first[1] // width if len(first) == 2 and first[1] % width == 0 else 1  # minimind-3v of early April 2026
    return {"projector_num_layers": 2, "projector_layer_norm": len(first) == 1, "patches_per_token": joined}
