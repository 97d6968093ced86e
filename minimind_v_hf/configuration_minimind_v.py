"""The configuration of MiniMind-V: a language model (`text_config`), an image encoder (`vision_config`), and what joins them.

This file is copied into every saved model folder, so it depends on transformers alone.
"""

import copy
import math
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, PreTrainedConfig, configuration_utils
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


__version__ = "0.2.0"


def _require(condition: bool, field: str, value: Any, expectation: str) -> None:
    """Raise a ValueError that names the field, its value and what was expected."""
    if not condition:
        raise ValueError(f"{field}={value!r}: {expectation}.")


def _is_count(value: Any, minimum: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_MAX_LAYERS = 1024


def _require_layers(field: str, value: Any) -> None:
    """A model of very many layers would be built until the memory is full, and one of none answers at random."""
    _require(_is_count(value) and value <= _MAX_LAYERS, field, value, f"expected a positive integer up to {_MAX_LAYERS}")


def _require_booleans(config: PreTrainedConfig, *fields: str) -> None:
    for field in fields:
        _require(isinstance(getattr(config, field), bool), field, getattr(config, field), "expected True or False")


def _require_activation(field: str, value: Any) -> None:
    _require(isinstance(value, str) and value in ACT2FN, field, value, f"expected one of {', '.join(sorted(ACT2FN))}")


class MiniMindVTextConfig(PreTrainedConfig):
    r"""Configuration of the MiniMind decoder, for all its generations: what differs between them are fields here.

    The defaults are MiniMind2 small (26M parameters).

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward block; by default 8/3 of `hidden_size`, rounded up to a multiple of 64.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads; must divide `hidden_size` unless `head_dim` is given.
        num_key_value_heads: number of key/value heads (grouped-query attention); must divide `num_attention_heads`.
        head_dim: width of one head, an even number; by default `hidden_size / num_attention_heads`.
        hidden_act: activation of the gated feed-forward block.
        max_position_embeddings: longest sequence that the model is meant for, in tokens.
        initializer_range: standard deviation of freshly initialised weights.
        rms_norm_eps: epsilon of the RMS norms (MiniMind2: 1e-5, minimind-3: 1e-6).
        use_qk_norm: RMS-normalise queries and keys over `head_dim`, before RoPE (minimind-3).
        rope_parameters: RoPE as transformers describes it, `{"rope_type": "default", "rope_theta": 1e6}` by default. Native
            `inference_rope_scaling` is `{"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 2048,
            "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0, "rope_theta": 1e6}`.
        attention_dropout: dropout of the attention weights in training.
        num_experts: experts of a mixture-of-experts feed-forward block; 0 is a dense model.
        num_experts_per_tok: experts that each token is sent to.
        num_shared_experts: experts that every token passes through, unweighted.
        moe_intermediate_size: width of one expert; by default `intermediate_size`.
        norm_topk_prob: divide the weights of the chosen experts by their sum.
        router_aux_loss_coef: weight of the load-balancing loss (native `aux_loss_alpha`, `router_aux_loss_coef`).
        seq_aux: balance the load within each sequence (MiniMind2) instead of within the batch (minimind-3).
        output_router_logits: return the router's logits, and the auxiliary loss also outside training.
    """

    model_type = "minimind_v_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # its name since transformers 5.24, and before
    default_theta = 1_000_000.0
    _auto_class = "AutoConfig"
    hub_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_minimind_v.MiniMindVTextConfig",
        "AutoModel": "modeling_minimind.MiniMindModel",
        "AutoModelForCausalLM": "modeling_minimind.MiniMindForCausalLM",
        "AutoModelForMultimodalLM": "modeling_minimind.MiniMindForCausalLM",
    }
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 6400
    hidden_size: int = 512
    intermediate_size: int = None  # type: ignore[assignment]  # derived in __post_init__
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = None  # type: ignore[assignment]  # derived in __post_init__
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_qk_norm: bool = False
    rope_parameters: dict = None  # type: ignore[assignment]  # derived in __post_init__
    attention_dropout: float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 2
    num_shared_experts: int = 0
    moe_intermediate_size: int = None  # type: ignore[assignment]  # derived in __post_init__
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.01
    seq_aux: bool = True
    output_router_logits: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        for field in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            _require(_is_count(getattr(self, field)), field, getattr(self, field), "expected a positive integer")
        _require_layers("num_hidden_layers", self.num_hidden_layers)
        _require_booleans(
            self,
            *("use_qk_norm", "use_cache", "tie_word_embeddings", "norm_topk_prob", "seq_aux", "output_router_logits"),
        )
        if self.head_dim is None:
            _require(
                self.hidden_size % self.num_attention_heads == 0,
                "num_attention_heads",
                self.num_attention_heads,
                f"expected a divisor of hidden_size={self.hidden_size}, or an explicit head_dim",
            )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 64 * math.ceil(self.hidden_size * 8 // 3 / 64)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        rope = self.rope_parameters
        _require(rope is None or isinstance(rope, dict), "rope_parameters", rope, "expected a dict or None")
        super().__post_init__(**kwargs)
        self._check()
        # Of the plan for all kinds of layers, what this model has
        absent = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if self.num_experts else ["mlp.experts"]
        if not (self.num_experts and self.num_shared_experts):
            absent.append("mlp.shared_experts")
        self.base_model_tp_plan = {
            name: plan for name, plan in type(self).base_model_tp_plan.items() if not any(f".{part}" in name for part in absent)
        }

    def _check(self) -> None:
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"expected a divisor of num_attention_heads={self.num_attention_heads}",
        )
        _require(
            _is_count(self.head_dim) and self.head_dim % 2 == 0,
            "head_dim",
            self.head_dim,
            "expected a positive even integer, since RoPE rotates pairs of dimensions",
        )
        for field in ("intermediate_size", "moe_intermediate_size"):
            _require(_is_count(getattr(self, field)), field, getattr(self, field), "expected a positive integer")
        for field in ("num_experts", "num_shared_experts"):
            _require(
                _is_count(getattr(self, field), minimum=0), field, getattr(self, field), "expected 0 or a positive integer"
            )
        if self.num_experts:
            _require(
                _is_count(self.num_experts_per_tok) and self.num_experts_per_tok <= self.num_experts,
                "num_experts_per_tok",
                self.num_experts_per_tok,
                f"expected an integer from 1 to num_experts={self.num_experts}",
            )
        _require(
            _is_number(self.attention_dropout) and 0 <= self.attention_dropout < 1,
            "attention_dropout",
            self.attention_dropout,
            "expected a number from 0 to below 1",
        )
        _require(
            _is_number(self.rms_norm_eps) and self.rms_norm_eps > 0,
            "rms_norm_eps",
            self.rms_norm_eps,
            "expected a positive number",
        )
        for field in ("initializer_range", "router_aux_loss_coef"):
            value = getattr(self, field)
            _require(_is_number(value) and value >= 0, field, value, "expected 0 or a positive number")
        _require_activation("hidden_act", self.hidden_act)
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            _require(
                all(_is_count(token_id, minimum=0) and token_id < self.vocab_size for token_id in ids),
                field,
                value,
                f"expected None, or an id inside the vocabulary, from 0 to {self.vocab_size - 1}",
            )
        self._check_rope()

    def _check_rope(self) -> None:
        rope_type, theta = self.rope_parameters["rope_type"], self.rope_parameters["rope_theta"]
        kinds = sorted({"default", *ROPE_INIT_FUNCTIONS})
        _require(rope_type in kinds, "rope_parameters['rope_type']", rope_type, f"expected one of {', '.join(kinds)}")
        _require(_is_number(theta) and theta > 0, "rope_parameters['rope_theta']", theta, "expected a positive number")
        factor = self.rope_parameters.get("factor", 1.0)
        _require(_is_number(factor) and factor >= 1, "rope_parameters['factor']", factor, "expected a number from 1 on")
        try:
            self.validate_rope()
        except KeyError as error:
            raise ValueError(f"rope_parameters={self.rope_parameters!r}: {error.args[0]}.") from None

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write config.json with the whole `auto_map`, whichever Auto class this config came from."""
        self.auto_map = dict(self.hub_auto_map)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _sub_config_specs(**classes: type[PreTrainedConfig]) -> dict[str, Any]:
    """What transformers 5.20 to 5.23 want for a class, and later ones make of it; 5.18 and 5.19 have nothing like it."""
    spec = getattr(configuration_utils, "SubConfigSpec", None)
    return {name: spec(config_class) for name, config_class in classes.items()} if spec else {}


class MiniMindVConfig(PreTrainedConfig):
    r"""Configuration of MiniMind-V. The defaults are MiniMind2-V small with CLIP ViT-B/16 at 224 pixels: 196 image tokens.

    Args:
        text_config: config, or dict with `model_type`, of the decoder: ours by default, or any that `AutoModel` builds.
        vision_config: config, or dict with `model_type`, of the encoder: `clip_vision_model` by default, or any that
            `AutoModel` builds. Of a whole CLIP or SigLIP config the vision half is taken.
        image_token_id: id of the image token. 190 is the byte 0xFF of the MiniMind2 vocabulary, which no text can produce.
        image_seq_length: image tokens per image. Derived from the encoder; a value that does not fit it is refused.
        patches_per_token: consecutive patch vectors that are concatenated into one image token, before the projector.
        projector_num_layers: 1 (MiniMind2-V) or 2 linear layers, with `projector_hidden_act` in between (minimind-3v).
        projector_layer_norm: normalise the patch vectors before the first layer (minimind-3v).
        projector_hidden_act: activation between two layers.
        multimodal_projector_bias: whether the linear layers have a bias.
        tie_word_embeddings: share the input and output embeddings; by default what `text_config` says.
    """

    model_type = "minimind_v"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    # transformers >= 5.20: lets config.json hold the nested configs without the base class's defaults
    sub_configs_defaults = _sub_config_specs(text_config=MiniMindVTextConfig, vision_config=CLIPVisionConfig)
    keys_to_ignore_at_inference = ["cache", "past_key_values", "image_outputs"]
    _auto_class = "AutoConfig"
    hub_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_minimind_v.MiniMindVConfig",
        # The base model, since engines build `AutoModel.from_config(config)` and bring their own head.
        # `AutoModel.from_pretrained` gives the model with the head all the same: see MiniMindVModel.from_pretrained.
        "AutoModel": "modeling_minimind_v.MiniMindVModel",
        "AutoModelForImageTextToText": "modeling_minimind_v.MiniMindVForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_minimind_v.MiniMindVForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_minimind_v.MiniMindVForConditionalGeneration",
        "AutoProcessor": "processing_minimind_v.MiniMindVProcessor",
    }

    text_config: PreTrainedConfig = None
    vision_config: PreTrainedConfig = None
    image_token_id: int = 190
    image_seq_length: int = None  # type: ignore[assignment]  # derived in __post_init__
    patches_per_token: int = 1
    projector_num_layers: int = 1
    projector_layer_norm: bool = False
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = None  # type: ignore[assignment]  # derived in __post_init__

    def __post_init__(self, **kwargs):
        self.text_config = _as_config(self.text_config, "text_config", {"model_type": MiniMindVTextConfig.model_type})
        self.vision_config = _as_config(
            self.vision_config, "vision_config", {"model_type": "clip_vision_model", "patch_size": 16}
        )
        # A whole CLIP or SigLIP checkpoint: only its encoder is wanted
        self.vision_config = getattr(self.vision_config, "vision_config", self.vision_config)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        _require_booleans(self, "projector_layer_norm", "multimodal_projector_bias", "tie_word_embeddings")
        if hasattr(self.vision_config, "num_hidden_layers"):
            _require_layers("vision_config.num_hidden_layers", self.vision_config.num_hidden_layers)
        for field in ("num_attention_heads", "hidden_size", "intermediate_size", "num_channels"):
            if hasattr(self.vision_config, field):
                size = getattr(self.vision_config, field)
                _require(_is_count(size), f"vision_config.{field}", size, "expected a positive integer")
        if isinstance(getattr(self.vision_config, "hidden_act", None), str):
            _require_activation("vision_config.hidden_act", self.vision_config.hidden_act)
        expected = self._image_seq_length_of_encoder()
        if self.image_seq_length is None:
            self.image_seq_length = expected
        super().__post_init__(**kwargs)
        _require(
            self.image_seq_length == expected,
            "image_seq_length",
            self.image_seq_length,
            f"expected {expected}, which is what the encoder gives (image_size={self.vision_config.image_size}, "
            f"patch_size={self.vision_config.patch_size}, patches_per_token={self.patches_per_token})",
        )
        _require(
            _is_count(self.image_token_id, minimum=0) and self.image_token_id < self.text_config.vocab_size,
            "image_token_id",
            self.image_token_id,
            f"expected an id inside the vocabulary, from 0 to {self.text_config.vocab_size - 1}",
        )
        layers = self.projector_num_layers
        _require(_is_count(layers) and layers <= 2, "projector_num_layers", layers, "expected 1 or 2")
        _require_activation("projector_hidden_act", self.projector_hidden_act)

    def _image_seq_length_of_encoder(self) -> int:
        vision = self.vision_config
        for field in ("image_size", "patch_size"):
            size = getattr(vision, field, None)
            expectation = "expected a positive integer, the side of a square in pixels"
            _require(_is_count(size), f"vision_config.{field}", size, expectation)
        num_patches = (vision.image_size // vision.patch_size) ** 2
        expectation = f"expected at most image_size={vision.image_size}"
        _require(num_patches > 0, "vision_config.patch_size", vision.patch_size, expectation)
        _require(
            _is_count(self.patches_per_token) and num_patches % self.patches_per_token == 0,
            "patches_per_token",
            self.patches_per_token,
            f"expected a divisor of the encoder's {num_patches} patches",
        )
        return num_patches // self.patches_per_token

    @classmethod
    def from_preset(cls, name: str, **kwargs) -> "MiniMindVConfig":
        """The configuration of a published model.

        Args:
            name: one of `MiniMindVConfig.presets()`.
            kwargs: fields to set differently; of `text_config` and `vision_config`, those that a dict names.

        Raises:
            ValueError: the name is not known.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset={name!r}: expected one of {', '.join(map(repr, _PRESETS))}.")
        fields = dict(_PRESETS[name])
        for field, value in kwargs.items():
            fields[field] = {**fields.get(field, {}), **value} if isinstance(value, dict) else value
        return cls(**fields)

    @staticmethod
    def presets() -> list[str]:
        """Names of the published models that `from_preset` knows."""
        return list(_PRESETS)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write config.json with the whole `auto_map`, whichever Auto class this config came from."""
        self.auto_map = dict(self.hub_auto_map)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _as_config(value, field: str, default: dict) -> PreTrainedConfig:
    """The config that `value` (a config, a dict or None) stands for; `default` fills what a dict leaves open."""
    if isinstance(value, PreTrainedConfig):
        return copy.deepcopy(value)  # a model writes into its config, and this one is the caller's
    _require(value is None or isinstance(value, dict), field, value, "expected a config, a dict or None")
    fields = dict(value or {})
    model_type = fields.setdefault("model_type", default["model_type"])
    if model_type == default["model_type"]:
        fields = {**default, **fields}
    # By name: in a folder loaded with remote code, AutoConfig does not know our decoder
    if model_type == MiniMindVTextConfig.model_type:
        return MiniMindVTextConfig(**fields)
    _require(model_type in CONFIG_MAPPING, f"{field}.model_type", model_type, "expected one that transformers knows")
    return AutoConfig.for_model(**fields)


_CLIP_VIT_B_16 = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 16}
_SIGLIP2_VIT_B_32 = {"model_type": "siglip_vision_model", "image_size": 256, "patch_size": 32}
_MINIMIND_3 = {
    "hidden_size": 768,
    "intermediate_size": 2432,  # 64 * ceil(pi * hidden_size / 64)
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "use_qk_norm": True,
}
_MINIMIND_3V = {"image_token_id": 12, "projector_num_layers": 2, "projector_layer_norm": True}

# The published models; sizes as in https://github.com/jingyaogong/minimind-v
_PRESETS: dict[str, dict[str, Any]] = {
    "minimind2-v-small": {"text_config": {}, "vision_config": _CLIP_VIT_B_16},
    "minimind2-v": {"text_config": {"hidden_size": 768, "num_hidden_layers": 16}, "vision_config": _CLIP_VIT_B_16},
    "minimind2-v-moe": {
        "text_config": {"hidden_size": 640, "num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1},
        "vision_config": _CLIP_VIT_B_16,
    },
    "minimind-3v": {"text_config": _MINIMIND_3, "vision_config": _SIGLIP2_VIT_B_32, **_MINIMIND_3V},
    "minimind-3v-moe": {
        "text_config": {
            **_MINIMIND_3,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "router_aux_loss_coef": 5e-4,
            "seq_aux": False,
        },
        "vision_config": _SIGLIP2_VIT_B_32,
        **_MINIMIND_3V,
    },
}

IMAGE_PLACEHOLDER = "<image>"
"""Where an image belongs in a prompt or a data set, whatever the tokenizer's own image token is."""

VIDEO_PLACEHOLDER = "<video>"
"""Where a video belongs in a prompt."""

CONTROL_MARK = "\ufdd0"
"""A Unicode noncharacter, which is reserved for use inside a program: it stands in no text."""

# `transformers serve` goes by this table: a type that is missing there is taken for a class of transformers itself
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[MiniMindVTextConfig.model_type] = "MiniMindForCausalLM"
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[MiniMindVConfig.model_type] = "MiniMindVForConditionalGeneration"

__all__ = ["MiniMindVConfig", "MiniMindVTextConfig"]
