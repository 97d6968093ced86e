"""What model a native file holds, read from the names and shapes of its tensors.

One damaged tensor must not mislead the reader, so each size is what most layers say, and the audit finds the odd one.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from convert.key_table import Generation
from convert.native_files import ConversionError
from minimind_v_hf import MiniMindVConfig, MiniMindVTextConfig


Shapes = Mapping[str, tuple[int, ...]]

RELEASES: dict[Generation, str] = {
    "minimind2-2025-02": "MiniMind2-V of February 2025",
    "minimind2": "MiniMind2-V",
    "minimind-3": "minimind-3v",
}
IMAGE_TOKENS: dict[Generation, int] = {"minimind2-2025-02": 196, "minimind2": 196, "minimind-3": 64}
"""Vectors per picture that the released models were trained with."""

DEFAULT_HEADS = 8  # in every release
DEFAULT_MAX_POSITION_EMBEDDINGS = 32768
_YARN = {"factor": 16, "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0}

# Ours: the names in a native config.json, of MiniMind2-V and minimind-3v, and of the first MiniMind2-V
_CONFIG_NAMES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "dim"),
    "intermediate_size": ("intermediate_size", "hidden_dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "n_kv_heads"),
    "rms_norm_eps": ("rms_norm_eps", "norm_eps"),
    "max_position_embeddings": ("max_position_embeddings", "max_seq_len"),
    "hidden_act": ("hidden_act",),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "num_experts_per_tok": ("num_experts_per_tok",),
    "norm_topk_prob": ("norm_topk_prob",),
    "seq_aux": ("seq_aux",),
    "router_aux_loss_coef": ("router_aux_loss_coef", "aux_loss_alpha"),
}
_LAYER_NAMES = {  # in the first MiniMind2-V, and since
    "q": ("attention.wq.weight", "self_attn.q_proj.weight"),
    "k": ("attention.wk.weight", "self_attn.k_proj.weight"),
    "norm": ("attention_norm.weight", "input_layernorm.weight"),
    "q_norm": ("attention.q_norm.weight", "self_attn.q_norm.weight"),
    "gate": ("feed_forward.w1.weight", "mlp.gate_proj.weight"),
    "expert": ("feed_forward.experts.*.w1.weight", "mlp.experts.*.gate_proj.weight"),
    "router": ("feed_forward.gate.weight", "mlp.gate.weight"),
}


@dataclass
class Options:
    """What the user said about the model; None where nothing was said."""

    num_attention_heads: int | None = None
    num_experts_per_tok: int | None = None
    inference_rope_scaling: bool = False
    max_position_embeddings: int | None = None


@dataclass
class Architecture:
    """A native model.

    Args:
        generation: how its tensors are named.
        config: ours. Of the whole model, or of the language model where no encoder was given.
        has_projector: False for language-model weights.
        rows: what, how much, and from where, for the table that the user sees.
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
    later = sum(name.startswith(("model.", "lm_head.")) for name in names)
    if first > later:
        return "minimind2-2025-02"
    if later:
        has_norm = sum(name.endswith("self_attn.q_norm.weight") for name in names)
        return "minimind-3" if 2 * has_norm > sum(name.endswith("self_attn.q_proj.weight") for name in names) else "minimind2"
    some = ", ".join(names[:3])
    raise ConversionError(f"no MiniMind language model is in this file: its tensors are {some}, …{_foreign_hint(names)}")


def _foreign_hint(names: list[str]) -> str:
    prefix = next((p for p in ("module.", "_orig_mod.", "model.model.") if all(n.startswith(p) for n in names)), None)
    if prefix:
        wrapper = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}.get(prefix, "another model")
        return f" (all begin with {prefix!r}, the mark of {wrapper}: save the wrapped model's state dict)"
    if any("lora" in name.lower() for name in names):
        return " (LoRA weights hold only what was changed: merge them into the full weights first)"
    if all(name.startswith("vision_proj.") for name in names):
        return " (a projector alone)"
    return ""


def detect(
    shapes: Shapes,
    options: Options,
    native_config: dict | None,
    vision_config: PreTrainedConfig | None,
    image_token_id: int | None,
) -> Architecture:
    """Read the architecture.

    Args:
        shapes: of all tensors, by native name.
        options: what the user said.
        native_config: config.json of a native folder.
        vision_config: of the encoder; None for a language model alone.
        image_token_id: of the tokenizer; None for a language model alone.

    Raises:
        ConversionError: the tensors, the options and the configurations contradict each other.
    """
    generation = detect_generation(shapes)
    layers = _Layers(shapes, generation)
    given = _from_native_config(native_config or {})
    rows = [("release", RELEASES[generation], "names of the tensors")]

    def choose(name: str, option: Any, default: Any) -> Any:
        """What cannot be read from the tensors: from the user, from config.json, or as published."""
        if option is not None:
            value, source = option, f"--{name.replace('_', '-')}"
        elif name in given:
            value, source = given[name], "config.json"
        else:
            value, source = default, f"published default; else pass --{name.replace('_', '-')}"
        rows.append((name, str(value), source))
        return value

    text: dict[str, Any] = {
        "vocab_size": layers.vocab_size(),
        "hidden_size": layers.size("norm", 0),
        "num_hidden_layers": layers.count,
    }
    q_rows, k_rows = layers.size("q", 0), layers.size("k", 0)
    rows += [(name, str(value), "shapes") for name, value in text.items()]

    # ── Attention ──
    if generation == "minimind-3":
        head_dim = layers.size("q_norm", 0)
        heads = _divide(q_rows, head_dim, f"{q_rows} rows of q_proj do not split into heads of width {head_dim} (q_norm)")
        said = options.num_attention_heads or given.get("num_attention_heads", heads)
        if said != heads:
            raise ConversionError(f"{said} heads were asked for, but the weights have {heads}: q_norm is {head_dim} wide")
        rows.append(("num_attention_heads", str(heads), f"shapes: {q_rows} rows of q_proj, q_norm {head_dim} wide"))
    else:
        heads = choose("num_attention_heads", options.num_attention_heads, DEFAULT_HEADS)
        head_dim = _divide(q_rows, heads, f"{q_rows} rows of q_proj do not split into {heads} heads")
    advice = "pass the right --num-attention-heads"
    kv_heads = _divide(k_rows, head_dim, f"{k_rows} rows of k_proj do not split into heads of width {head_dim}: {advice}")
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    text["use_qk_norm"] = generation == "minimind-3"
    rows.append(("num_key_value_heads", str(kv_heads), f"shapes: {k_rows} rows of k_proj, {head_dim} to a head"))

    # ── Feed-forward ──
    num_experts = layers.size("router", 0) if layers.has("router") or layers.has("expert") else 0
    text["intermediate_size"] = layers.size("expert" if num_experts else "gate", 0)
    rows.append(("intermediate_size", str(text["intermediate_size"]), "shapes"))
    if num_experts:
        text |= {"num_experts": num_experts, "num_shared_experts": layers.num_shared_experts()}
        rows += [(name, str(text[name]), "names and shapes") for name in ("num_experts", "num_shared_experts")]
        is_3 = generation == "minimind-3"
        text["num_experts_per_tok"] = choose("num_experts_per_tok", options.num_experts_per_tok, 1 if is_3 else 2)
        published = {"minimind2-2025-02": 0.1, "minimind2": 0.01, "minimind-3": 5e-4}[generation]
        text["router_aux_loss_coef"] = given.get("router_aux_loss_coef", published)
        text["seq_aux"] = given.get("seq_aux", not is_3)
        text["norm_topk_prob"] = given.get("norm_topk_prob", True)
    elif options.num_experts_per_tok is not None:
        raise ConversionError("--num-experts-per-tok was given, but this is a dense model, without experts")
    else:
        rows.append(("num_experts", "0 (dense)", "names of the tensors"))

    # ── The rest ──
    text["rms_norm_eps"] = given.get("rms_norm_eps", 1e-6 if generation == "minimind-3" else 1e-5)
    rows.append(("rms_norm_eps", str(text["rms_norm_eps"]), "config.json" if "rms_norm_eps" in given else "release"))
    text["hidden_act"] = given.get("hidden_act", "silu")
    text["tie_word_embeddings"] = given.get("tie_word_embeddings", True)
    longest = choose("max_position_embeddings", options.max_position_embeddings, DEFAULT_MAX_POSITION_EMBEDDINGS)
    text["max_position_embeddings"] = longest
    text["rope_parameters"] = _rope(generation, options, native_config or {}, longest, rows)
    _compare_with_config(text, given)
    try:
        config: MiniMindVConfig | MiniMindVTextConfig = MiniMindVTextConfig(**text)
        projector = _detect_projector(shapes, generation)
        if vision_config is not None:
            config = _with_eyes(config, projector or _fresh_projector(generation), shapes, vision_config, image_token_id, rows)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    config.native_generation = generation  # for the way back
    return Architecture(generation, config, projector is not None, rows)


class _Layers:
    """The sizes that most decoder layers agree on."""

    def __init__(self, shapes: Shapes, generation: Generation):
        self.first = generation == "minimind2-2025-02"
        self.shapes = shapes
        pattern = re.compile(r"layers\.(\d+)\.(.+)" if self.first else r"model\.layers\.(\d+)\.(.+)")
        tensors_per_layer: Counter[int] = Counter()
        self.votes: dict[str, Counter[tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            match = pattern.fullmatch(name)
            if match:
                tensors_per_layer[int(match[1])] += 1
                part = re.sub(r"(?<=\.experts\.)\d+", "*", match[2])
                self.votes.setdefault(part, Counter())[shape] += 1
        most = max(tensors_per_layer.values(), default=0)
        # A misnamed tensor makes no layer
        self.count = max((layer + 1 for layer, count in tensors_per_layer.items() if 2 * count >= most), default=0)

    def has(self, part: str) -> bool:
        return _LAYER_NAMES[part][not self.first] in self.votes

    def size(self, part: str, dim: int) -> int:
        name = _LAYER_NAMES[part][not self.first]
        if name not in self.votes:
            raise ConversionError(f"this is no complete MiniMind model: no layer has a tensor {name}")
        shape, _ = self.votes[name].most_common(1)[0]
        return shape[dim] if len(shape) > dim else 0

    def vocab_size(self) -> int:
        names = ("tok_embeddings.weight", "output.weight") if self.first else ("model.embed_tokens.weight", "lm_head.weight")
        found = [self.shapes[name][0] for name in names if len(self.shapes.get(name, ())) == 2]
        if not found:
            raise ConversionError(f"this is no complete MiniMind model: it has neither {names[0]} nor {names[1]}")
        return max(found)

    def num_shared_experts(self) -> int:
        numbers = [re.search(r"\.shared_experts\.(?:(\d+)\.)?", name) for name in self.votes]
        return max((int(match[1] or 0) + 1 for match in numbers if match), default=0)


def _divide(number: int, by: int, otherwise: str) -> int:
    if by < 1 or number < by or number % by:
        raise ConversionError(otherwise)
    return number // by


def _from_native_config(native: dict) -> dict[str, Any]:
    found = {}
    for ours, names in _CONFIG_NAMES.items():
        value = next((native[name] for name in names if native.get(name) is not None), None)
        if value is not None:
            found[ours] = value
    return found


def _compare_with_config(text: dict[str, Any], given: dict[str, Any]) -> None:
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size"):
        if given.get(name, text[name]) != text[name]:
            raise ConversionError(f"config.json says {name}={given[name]}, but the weights have {text[name]}")


def _rope(generation: Generation, options: Options, native: dict, longest: int, rows: list) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(native.get("rope_theta") or 1e6)}
    wanted = options.inference_rope_scaling or bool(native.get("inference_rope_scaling"))
    scaling = _YARN | {name: value for name, value in (native.get("rope_scaling") or {}).items() if name in _YARN}
    source = "--inference-rope-scaling" if options.inference_rope_scaling else "config.json"
    if options.inference_rope_scaling and generation == "minimind2-2025-02":
        raise ConversionError("--inference-rope-scaling: the first MiniMind2-V has no YaRN")
    if options.inference_rope_scaling and longest <= scaling["original_max_position_embeddings"]:
        raise ConversionError(
            f"--inference-rope-scaling has no effect with max_position_embeddings={longest}: native MiniMind-V applies it "
            f"beyond {scaling['original_max_position_embeddings']}"
        )
    if wanted and longest > scaling["original_max_position_embeddings"]:
        rows.append(("RoPE", f"YaRN, factor {scaling['factor']}, base {rope['rope_theta']:g}", source))
        return rope | scaling | {"rope_type": "yarn"}
    source = "config.json" if native.get("rope_theta") else "published default; for YaRN pass --inference-rope-scaling"
    rows.append(("RoPE", f"plain, base {rope['rope_theta']:g}", source))
    return rope


# ── Projector and encoder ──


def _detect_projector(shapes: Shapes, generation: Generation) -> dict[str, Any] | None:
    names = [name for name in shapes if name.startswith("vision_proj.")]
    if not names:
        return None
    if any(name.startswith("vision_proj.vision_proj.") for name in names):
        return {"projector_num_layers": 1}
    has_norm = any(name.startswith(("vision_proj.mlp.1.", "vision_proj.mlp.3.")) for name in names)
    return {"projector_num_layers": 2, "projector_layer_norm": has_norm}


def _fresh_projector(generation: Generation) -> dict[str, Any]:
    if generation == "minimind-3":
        return {"projector_num_layers": 2, "projector_layer_norm": True}
    return {"projector_num_layers": 1}


def _with_eyes(
    text_config: MiniMindVTextConfig,
    projector: dict[str, Any],
    shapes: Shapes,
    vision_config: PreTrainedConfig,
    image_token_id: int | None,
    rows: list,
) -> MiniMindVConfig:
    width = vision_config.hidden_size
    joined = shapes.get("vision_proj.mlp.0.weight", ())
    # The projector of early April 2026 takes several patches at once
    if len(joined) == 2 and not projector.get("projector_layer_norm") and joined[1] % width == 0:
        projector = {**projector, "patches_per_token": joined[1] // width}
    config = MiniMindVConfig(text_config=text_config, vision_config=vision_config, image_token_id=image_token_id, **projector)
    kind = "LayerNorm, Linear, GELU, Linear" if config.projector_layer_norm else "Linear, GELU, Linear"
    kind = kind if config.projector_num_layers == 2 else "Linear"
    kind += f", {config.patches_per_token} patches joined" if config.patches_per_token > 1 else ""
    vision = config.vision_config
    seen = f"{vision.model_type}, {vision.image_size} px, {config.image_seq_length} vectors of {vision.hidden_size}"
    rows.append(("projector", kind, "names and shapes" if joined or _has_projector(shapes) else "new: this file has none"))
    rows.append(("image encoder", seen, "--vision-tower"))
    rows.append(("image token", f"id {config.image_token_id}", "--tokenizer"))
    return config


def _has_projector(shapes: Shapes) -> bool:
    return any(name.startswith("vision_proj.") for name in shapes)
