"""What a native file holds, read from the names and shapes of its tensors.

Sizes come from the embedding and from layer 0; the audit finds the tensors that differ from them.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from ..configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig
from .key_table import Generation
from .native_files import ConversionError, first_line


RELEASES: dict[Generation, str] = {
    "minimind2-2025-02": "MiniMind2-V of February 2025",
    "minimind2": "MiniMind2-V",
    "minimind-3": "minimind-3v",
}
IMAGE_TOKENS: dict[Generation, int] = {"minimind2-2025-02": 196, "minimind2": 196, "minimind-3": 64}
"""Image tokens that the released models were trained with."""

DEFAULT_HEADS = 8  # in every release
_YARN = {"factor": 16, "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0}

# Ours: type, and the names in a native config.json, of MiniMind2-V and minimind-3v, and of the first MiniMind2-V
_CONFIG_NAMES: dict[str, tuple[type, tuple[str, ...]]] = {
    "vocab_size": (int, ("vocab_size",)),
    "hidden_size": (int, ("hidden_size", "dim")),
    "intermediate_size": (int, ("intermediate_size", "hidden_dim")),
    "num_hidden_layers": (int, ("num_hidden_layers", "n_layers")),
    "num_attention_heads": (int, ("num_attention_heads", "n_heads")),
    "num_key_value_heads": (int, ("num_key_value_heads", "n_kv_heads")),
    "rms_norm_eps": (float, ("rms_norm_eps", "norm_eps")),
    "max_position_embeddings": (int, ("max_position_embeddings", "max_seq_len")),
    "hidden_act": (str, ("hidden_act",)),
    "tie_word_embeddings": (bool, ("tie_word_embeddings",)),
    "num_experts_per_tok": (int, ("num_experts_per_tok",)),
    "norm_topk_prob": (bool, ("norm_topk_prob",)),
    "seq_aux": (bool, ("seq_aux",)),
    "router_aux_loss_coef": (float, ("router_aux_loss_coef", "aux_loss_alpha")),
    "rope_theta": (float, ("rope_theta",)),
    "rope_scaling": (dict, ("rope_scaling",)),
    "inference_rope_scaling": (bool, ("inference_rope_scaling",)),
}


@dataclass
class Architecture:
    """A native model.

    Args:
        generation: how its tensors are named.
        config: ours. Of the whole model, or of the language model where no encoder was given.
        has_projector: False for language-model weights.
        rows: what, how much, and from where, for the table that the user reads.
    """

    generation: Generation
    config: MiniMindVConfig | MiniMindVTextConfig
    has_projector: bool
    rows: list[tuple[str, str, str]] = field(default_factory=list)


def detect_generation(names: Iterable[str]) -> Generation:
    """How the decoder's tensors are named.

    Raises:
        ConversionError: there is no MiniMind decoder.
    """
    names = list(names)
    first = sum(name.startswith(("tok_embeddings.", "layers.", "output.")) for name in names)
    later = sum(name.startswith(("model.layers.", "lm_head.")) for name in names)
    if first > later:
        return "minimind2-2025-02"
    if later:
        return "minimind-3" if any(name.endswith("self_attn.q_norm.weight") for name in names) else "minimind2"
    hint = ""
    for prefix, wrapper in (("module.", "DistributedDataParallel"), ("_orig_mod.", "torch.compile")):
        if all(name.startswith(prefix) for name in names):
            hint = f" (all begin with {prefix!r}, the mark of {wrapper}: save the wrapped model's state dict)"
    if any("lora" in name.lower() for name in names):
        hint = " (LoRA weights hold only what was changed: merge them into the full weights first)"
    if all(name.startswith("vision_proj.") for name in names):
        hint = " (a projector alone)"
    raise ConversionError(f"no MiniMind language model is in this file: its tensors are {', '.join(names[:3])}, …{hint}")


def detect(
    shapes: Mapping[str, tuple[int, ...]],
    native_config: dict[str, Any],
    vision_config: PreTrainedConfig | None = None,
    image_token_id: int | None = None,
    *,
    num_attention_heads: int | None = None,
    num_experts_per_tok: int | None = None,
    inference_rope_scaling: bool = False,
    max_position_embeddings: int | None = None,
) -> Architecture:
    """Read the architecture.

    Args:
        shapes: of all tensors, by native name.
        native_config: config.json of a native folder, or an empty dict.
        vision_config: of the encoder; None for a language model alone.
        image_token_id: of the tokenizer; None for a language model alone.
        num_attention_heads, num_experts_per_tok, inference_rope_scaling, max_position_embeddings: what the user tells.

    Raises:
        ConversionError: the tensors, the options and the configurations contradict each other.
    """
    generation = detect_generation(shapes)
    is_first, is_3 = generation == "minimind2-2025-02", generation == "minimind-3"
    given = _from_native_config(native_config)
    rows = [("release", RELEASES[generation], "names of the tensors")]

    def rows_of(name: str) -> int:
        """Rows of a tensor of layer 0, or of a whole name."""
        full_name = (
            name if name in ("output.weight", "lm_head.weight") else ("layers.0." if is_first else "model.layers.0.") + name
        )
        if not shapes.get(full_name):
            raise ConversionError(f"this is no complete MiniMind model: it has no tensor {full_name}")
        return shapes[full_name][0]

    def choose(name: str, option: int | None, default: int) -> int:
        """What the tensors do not tell: from the user, from config.json, or as published."""
        flag = f"--{name.replace('_', '-')}"
        sources = ((option, flag), (given.get(name), "config.json"), (default, f"published default; else pass {flag}"))
        value, source = next((value, source) for value, source in sources if value is not None)
        rows.append((name, str(value), source))
        return value

    text: dict[str, Any] = {
        "vocab_size": rows_of("output.weight" if is_first else "lm_head.weight"),
        "hidden_size": rows_of("attention_norm.weight" if is_first else "input_layernorm.weight"),
        "num_hidden_layers": _count(shapes, r"layers\.(\d{1,6})\." if is_first else r"model\.layers\.(\d{1,6})\."),
    }
    rows += [(name, str(value), "names and shapes") for name, value in text.items()]

    # ── Attention ──
    q_rows, k_rows = (rows_of(f"attention.w{x}.weight" if is_first else f"self_attn.{x}_proj.weight") for x in "qk")
    if is_3:
        head_dim = rows_of("self_attn.q_norm.weight")
        heads = _divide(q_rows, head_dim, f"{q_rows} rows of q_proj do not split into heads of width {head_dim} (q_norm)")
        told = given.get("num_attention_heads", heads) if num_attention_heads is None else num_attention_heads
        if told != heads:
            raise ConversionError(f"{told} heads were asked for, but the weights have {heads}: q_norm is {head_dim} wide")
        rows.append(("num_attention_heads", str(heads), f"shapes: {q_rows} rows of q_proj, q_norm {head_dim} wide"))
    else:
        heads = choose("num_attention_heads", num_attention_heads, DEFAULT_HEADS)
        head_dim = _divide(q_rows, heads, f"{q_rows} rows of q_proj do not split into {heads} heads")
    advice = "pass the right --num-attention-heads"
    kv_heads = _divide(k_rows, head_dim, f"{k_rows} rows of k_proj do not split into heads of width {head_dim}: {advice}")
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "use_qk_norm": is_3}
    rows.append(("num_key_value_heads", str(kv_heads), f"shapes: {k_rows} rows of k_proj, {head_dim} to a head"))

    # ── Feed-forward ──
    mlp, gate = ("feed_forward", "w1") if is_first else ("mlp", "gate_proj")
    num_experts = _count(shapes, r".*\.(?:mlp|feed_forward)\.experts\.(\d{1,6})\.")
    text["intermediate_size"] = rows_of(f"{mlp}.experts.0.{gate}.weight" if num_experts else f"{mlp}.{gate}.weight")
    rows.append(("intermediate_size", str(text["intermediate_size"]), "shapes"))
    text["num_experts"] = num_experts
    rows.append(("num_experts", str(num_experts) if num_experts else "0 (dense)", "names of the tensors"))
    if num_experts:
        # The first MiniMind2-V has one, without a number
        shared = int(any(".shared_experts.w1" in name for name in shapes)) or _count(shapes, r".*\.shared_experts\.(\d{1,6})\.")
        text["num_shared_experts"] = shared
        rows.append(("num_shared_experts", str(shared), "names of the tensors"))
        text["num_experts_per_tok"] = choose("num_experts_per_tok", num_experts_per_tok, 1 if is_3 else 2)
        coefficient = {"minimind2-2025-02": 0.1, "minimind2": 0.01, "minimind-3": 5e-4}[generation]
        defaults = {"router_aux_loss_coef": coefficient, "seq_aux": not is_3, "norm_topk_prob": True}
        text |= {name: given.get(name, default) for name, default in defaults.items()}
    elif num_experts_per_tok is not None:
        raise ConversionError("--num-experts-per-tok was given, but this is a dense model, without experts")

    # ── The rest ──
    text["rms_norm_eps"] = given.get("rms_norm_eps", 1e-6 if is_3 else 1e-5)
    rows.append(("rms_norm_eps", str(text["rms_norm_eps"]), "config.json" if "rms_norm_eps" in given else "release"))
    text |= {"hidden_act": given.get("hidden_act", "silu"), "tie_word_embeddings": given.get("tie_word_embeddings", True)}
    longest = choose("max_position_embeddings", max_position_embeddings, 32768)
    text["max_position_embeddings"] = longest
    text["rope_parameters"] = _rope(inference_rope_scaling, given, longest, is_first, rows)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size"):
        if given.get(name, text[name]) != text[name]:
            raise ConversionError(f"config.json says {name}={given[name]}, but the weights have {text[name]}")
    has_projector = any(name.startswith("vision_proj.") for name in shapes)
    try:
        config: MiniMindVConfig | MiniMindVTextConfig = MiniMindVTextConfig(**text)
        if vision_config is not None:
            projector = _projector(shapes, has_projector, is_3, vision_config.hidden_size)
            parts = {"text_config": config, "vision_config": vision_config, "image_token_id": image_token_id}
            config = MiniMindVConfig(**parts, **projector)
            rows += _rows_of_vision(config, "names and shapes" if has_projector else "new: this file has none")
    except (ValueError, TypeError) as error:
        raise ConversionError(first_line(error)) from None
    config.native_generation = generation  # for the way back
    return Architecture(generation, config, has_projector, rows)


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """How many numbers, from 0 on, stand in the names; one too large to count the tensors of this file is none."""
    numbers = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
    return max((number + 1 for number in numbers if number < len(shapes)), default=0)


def _divide(number: int, by: int, otherwise: str) -> int:
    if by < 1 or number < by or number % by:
        raise ConversionError(otherwise)
    return number // by


def _from_native_config(native: dict[str, Any]) -> dict[str, Any]:
    """By our names, with values of the right type. null stands for nothing."""
    found = {}
    for ours, (kind, names) in _CONFIG_NAMES.items():
        for name in names:
            value = native.get(name)
            if value is None or ours in found:
                continue
            fits = type(value) in (int, float) and math.isfinite(value) if kind is float else type(value) is kind
            if not fits:
                raise ConversionError(f"config.json says {name}={value!r}, where {kind.__name__} was expected")
            found[ours] = value
    return found


def _rope(wanted: bool, given: dict[str, Any], longest: int, is_first: bool, rows: list) -> dict[str, Any]:
    """Native MiniMind-V applies YaRN where it is asked for, and only beyond the length of its training."""
    theta = float(given.get("rope_theta", 1e6))
    scaling = dict(_YARN)
    for name, value in given.get("rope_scaling", {}).items():
        if name in _YARN:
            if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
                raise ConversionError(
                    f"config.json says rope_scaling[{name!r}]={value!r}, where a positive number was expected"
                )
            scaling[name] = value
    original = scaling["original_max_position_embeddings"]
    if wanted and is_first:
        raise ConversionError("--inference-rope-scaling: the first MiniMind2-V has no YaRN")
    if wanted and longest <= original:
        raise ConversionError(
            f"--inference-rope-scaling has no effect with max_position_embeddings={longest}: native MiniMind-V applies it "
            f"beyond {original}"
        )
    if (wanted or given.get("inference_rope_scaling", False)) and longest > original:
        source = "--inference-rope-scaling" if wanted else "config.json"
        rows.append(("RoPE", f"YaRN, factor {scaling['factor']}, base {theta:g}", source))
        return {"rope_type": "yarn", "rope_theta": theta, **scaling}
    source = "config.json" if "rope_theta" in given else "published default; for YaRN pass --inference-rope-scaling"
    rows.append(("RoPE", f"plain, base {theta:g}", source))
    return {"rope_type": "default", "rope_theta": theta}


def _projector(shapes: Mapping[str, tuple[int, ...]], is_there: bool, is_3: bool, width: int) -> dict[str, Any]:
    """The fields of our configuration that describe the projector: of the file, or of the release."""
    if not is_there:
        return {"projector_num_layers": 2, "projector_layer_norm": True} if is_3 else {"projector_num_layers": 1}
    if any(name.startswith("vision_proj.vision_proj.") for name in shapes):
        return {"projector_num_layers": 1}
    first = shapes.get("vision_proj.mlp.0.weight", ())
    fields: dict[str, Any] = {"projector_num_layers": 2, "projector_layer_norm": len(first) == 1}
    if len(first) == 2 and first[1] % width == 0:  # minimind-3v of early April 2026 takes several patches at once
        fields["patches_per_token"] = first[1] // width
    return fields


def _rows_of_vision(config: MiniMindVConfig, source: str) -> list[tuple[str, str, str]]:
    kind = "Linear, GELU, Linear" if config.projector_num_layers == 2 else "Linear"
    kind = f"LayerNorm, {kind}" if config.projector_layer_norm else kind
    kind += f", {config.patches_per_token} patches joined" if config.patches_per_token > 1 else ""
    vision = config.vision_config
    encoder = f"{vision.model_type}, {vision.image_size} px, {config.image_seq_length} image tokens"
    return [
        ("projector", kind, source),
        ("image encoder", encoder, "--vision-tower"),
        ("image token", f"id {config.image_token_id}", "--tokenizer"),
    ]
