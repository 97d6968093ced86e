"""The configuration of MiniMind-V: a language model (`text_config`), an image encoder (`vision_config`), and what joins them.

This file is copied into every saved model folder, so it depends on transformers alone.
"""

import copy
import math
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Optional, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, PreTrainedConfig, configuration_utils
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.type_validators import activation_fn_key, interval


__version__ = "0.2.0"

T = TypeVar("T")
if TYPE_CHECKING:
    Derived = Annotated[T, "None is replaced in __post_init__"]
else:
    Derived = Optional

# Larger ones would be built until the memory is full
_MAX_LAYERS, _MAX_EXPERTS, _MAX_WIDTH, _MAX_VOCABULARY, _MAX_IMAGE_SIZE = 1024, 1024, 2**17, 2**22, 2**13


def _with_value_errors(cls: type[T]) -> type[T]:
    """Let @strict raise a ValueError of one line, and not its own type, when a config is made, changed or saved."""
    set_attribute, validate_all = cls.__setattr__, cls.validate  # type: ignore[attr-defined]

    def __setattr__(self, name, value):
        try:
            set_attribute(self, name, value)
        except StrictDataclassError as error:
            reason, kind = str(error.__cause__), self.__dataclass_fields__[name].type
            if isinstance(error.__cause__, TypeError):
                reason = f"expected {kind.__name__ if isinstance(kind, type) else str(kind).removeprefix('typing.')}."
            raise ValueError(f"{name}={value!r}: {reason}") from None

    @wraps(validate_all)
    def validate(self):
        try:
            validate_all(self)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__)) from None

    cls.__setattr__, cls.validate = __setattr__, validate  # type: ignore[method-assign, attr-defined]
    return cls


# So that config.json holds the nested configs without the base class's defaults. 5.18 and 5.19 have no such thing, nor need it
_sub_config = getattr(configuration_utils, "SubConfigSpec", lambda config_class: config_class)


def _require_integer(field: str, value: Any, highest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= highest:
        raise ValueError(f"{field}={value!r}: expected an integer from 1 to {highest}.")


class _NamesItsCode:
    """A config whose saved folder names the code of the config, the models and the processor."""

    hub_auto_map: ClassVar[dict[str, str]]

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write config.json with the whole `auto_map`, whichever Auto class this config came from."""
        self.auto_map = dict(self.hub_auto_map)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]


@_with_value_errors
@strict
class MiniMindVTextConfig(_NamesItsCode, PreTrainedConfig):
    r"""Configuration of the MiniMind decoder, for all its generations. The defaults are MiniMind2 small (26M parameters).

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

    vocab_size: int = interval(min=1, max=_MAX_VOCABULARY)(default=6400)
    hidden_size: int = interval(min=1, max=_MAX_WIDTH)(default=512)
    intermediate_size: Derived[int] = None  # type: ignore[assignment]
    num_hidden_layers: int = interval(min=1, max=_MAX_LAYERS)(default=8)
    num_attention_heads: int = interval(min=1, max=_MAX_WIDTH)(default=8)
    num_key_value_heads: int = interval(min=1, max=_MAX_WIDTH)(default=2)
    head_dim: Derived[int] = None  # type: ignore[assignment]
    hidden_act: str = activation_fn_key(default="silu")
    max_position_embeddings: int = interval(min=1)(default=32768)
    initializer_range: int | float = interval(min=0, max=1)(default=0.02)
    rms_norm_eps: int | float = interval(min=0, max=1, exclude_min=True)(default=1e-5)
    use_qk_norm: bool = False
    rope_parameters: Derived[dict] = None  # type: ignore[assignment]
    attention_dropout: int | float = interval(min=0, max=1, exclude_max=True)(default=0.0)
    use_cache: bool = True
    tie_word_embeddings: bool = True
    num_experts: int = interval(min=0, max=_MAX_EXPERTS)(default=0)
    num_experts_per_tok: int = 2
    num_shared_experts: int = interval(min=0, max=_MAX_EXPERTS)(default=0)
    moe_intermediate_size: Derived[int] = None  # type: ignore[assignment]
    norm_topk_prob: bool = True
    router_aux_loss_coef: int | float = interval(min=0, max=1000)(default=0.01)
    seq_aux: bool = True
    output_router_logits: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            width, heads = self.hidden_size, self.num_attention_heads
            if width % heads:
                raise ValueError(
                    f"num_attention_heads={heads}: expected a divisor of hidden_size={width}, or a given head_dim."
                )
            self.head_dim = width // heads
        if self.intermediate_size is None:
            self.intermediate_size = 64 * math.ceil(self.hidden_size * 8 // 3 / 64)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        super().__post_init__(**kwargs)
        # Of the plan for all kinds of layers, what this model has
        absent = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if self.num_experts else ["mlp.experts"]
        if not (self.num_experts and self.num_shared_experts):
            absent.append("mlp.shared_experts")
        self.base_model_tp_plan = {
            name: plan for name, plan in type(self).base_model_tp_plan.items() if not any(f".{part}" in name for part in absent)
        }

    # @strict calls what is named validate_* when a config is made and when it is saved

    def validate_architecture(self):
        heads, kv_heads, head_dim = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads}: expected a divisor of num_attention_heads={heads}.")
        if head_dim <= 0 or head_dim % 2:
            raise ValueError(f"head_dim={head_dim}: expected a positive even integer, since RoPE rotates pairs of dimensions.")
        _require_integer("num_attention_heads * head_dim", heads * head_dim, _MAX_WIDTH)
        _require_integer("intermediate_size", self.intermediate_size, _MAX_WIDTH)
        _require_integer("moe_intermediate_size", self.moe_intermediate_size, _MAX_WIDTH)
        chosen, experts = self.num_experts_per_tok, self.num_experts
        if experts and not 1 <= chosen <= experts:
            raise ValueError(f"num_experts_per_tok={chosen}: expected an integer from 1 to num_experts={experts}.")

    def validate_token_ids(self):
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(0 <= token_id < self.vocab_size for token_id in ids):
                raise ValueError(
                    f"{field}={value}: expected None, or an id in the vocabulary, from 0 to {self.vocab_size - 1}."
                )

    def validate_rope(self):
        rope, kinds = self.rope_parameters, sorted({"default", *ROPE_INIT_FUNCTIONS})
        if rope["rope_type"] not in kinds:
            kind = rope["rope_type"]
            raise ValueError(f"rope_parameters['rope_type']={kind!r}: expected one of {', '.join(kinds)}.")
        for field, value in {"rope_theta": rope["rope_theta"], "factor": rope.get("factor", 1)}.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value < math.inf:
                raise ValueError(f"rope_parameters[{field!r}]={value!r}: expected a number from 1 on.")
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(f"rope_parameters={rope!r}: {error.args[0]}.") from None


@_with_value_errors
@strict
class MiniMindVConfig(_NamesItsCode, PreTrainedConfig):
    r"""Configuration of MiniMind-V. The defaults are MiniMind2-V small with CLIP ViT-B/16 at 224 pixels: 196 image tokens.

    Args:
        text_config: config, or dict with `model_type`, of the decoder: ours by default, or any that `AutoModel` builds.
        vision_config: config, or dict with `model_type`, of the encoder: `clip_vision_model` by default, or any that
            `AutoModel` builds. Of a whole CLIP or SigLIP config the vision half is taken. A convolutional encoder, whose
            config knows neither, is to be given `image_size` and `patch_size`, its stride, in pixels.
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
    sub_configs_defaults = {"text_config": _sub_config(MiniMindVTextConfig), "vision_config": _sub_config(CLIPVisionConfig)}
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

    text_config: Any = None
    vision_config: Any = None
    image_token_id: int = 190
    image_seq_length: Derived[int] = None  # type: ignore[assignment]
    patches_per_token: int = interval(min=1)(default=1)
    projector_num_layers: Literal[1, 2] = 1
    projector_layer_norm: bool = False
    projector_hidden_act: str = activation_fn_key(default="gelu")
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        self.text_config = _as_config(self.text_config, "text_config", {"model_type": MiniMindVTextConfig.model_type})
        vision_config = _as_config(self.vision_config, "vision_config", _CLIP_VIT_B_16)
        # Of a whole CLIP or SigLIP checkpoint, only its encoder is wanted
        self.vision_config = getattr(vision_config, "vision_config", vision_config)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.validate_vision_config()
        if self.image_seq_length is None:
            self.image_seq_length = self._num_patches() // self.patches_per_token
        super().__post_init__(**kwargs)

    def validate_vision_config(self):
        """Check what every encoder has (the side of its square images and patches, in pixels), and what most have."""
        vision = self.vision_config
        if hasattr(vision, "hidden_sizes"):
            vision.hidden_size = vision.hidden_sizes[-1]  # a convolutional encoder has one for each stage
        for field in ("image_size", "patch_size"):
            _require_integer(f"vision_config.{field}", getattr(vision, field, None), _MAX_IMAGE_SIZE)
        if vision.patch_size > vision.image_size:
            raise ValueError(f"vision_config.patch_size={vision.patch_size}: expected at most image_size={vision.image_size}.")
        highest = dict.fromkeys(("num_attention_heads", "hidden_size", "intermediate_size", "num_channels"), _MAX_WIDTH)
        for field, limit in {**highest, "num_hidden_layers": _MAX_LAYERS}.items():
            if hasattr(vision, field):
                _require_integer(f"vision_config.{field}", getattr(vision, field), limit)
        act = getattr(vision, "hidden_act", None)
        if isinstance(act, str) and act not in ACT2FN:
            raise ValueError(f"vision_config.hidden_act={act!r}: expected one of {', '.join(sorted(ACT2FN))}.")

    def validate_image_tokens(self):
        patches, joined = self._num_patches(), self.patches_per_token
        if patches % joined:
            raise ValueError(f"patches_per_token={joined}: expected a divisor of the encoder's {patches} patches.")
        if self.image_seq_length != patches // joined:
            raise ValueError(
                f"image_seq_length={self.image_seq_length}: expected {patches // joined}, which is what the encoder gives "
                f"({patches} patches, patches_per_token={joined})."
            )

    def validate_token_ids(self):
        end = self.text_config.vocab_size - 1
        if not 0 <= self.image_token_id <= end:
            raise ValueError(f"image_token_id={self.image_token_id}: expected an id in the vocabulary, from 0 to {end}.")

    def _num_patches(self) -> int:
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

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


def _as_config(value, field: str, default: dict) -> PreTrainedConfig:
    """The config that `value` (a config, a dict or None) stands for; `default` fills what a dict leaves open."""
    if isinstance(value, PreTrainedConfig):
        return copy.deepcopy(value)  # a model writes into its config, and this one is the caller's
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{field}={value!r}: expected a config, a dict or None.")
    fields = dict(value or {})
    model_type = fields.setdefault("model_type", default["model_type"])
    if model_type == default["model_type"]:
        fields = {**default, **fields}
    # By name: in a folder loaded with remote code, AutoConfig does not know our decoder
    if model_type == MiniMindVTextConfig.model_type:
        return MiniMindVTextConfig(**fields)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{field}.model_type={model_type!r}: expected one that transformers knows.")
    try:
        return AutoConfig.for_model(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"{field}: {error.__cause__}") from None


_CLIP_VIT_B_16 = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 16}
_SIGLIP2_VIT_B_32 = {"model_type": "siglip_vision_model", "image_size": 256, "patch_size": 32}
_MINIMIND2_MOE = {"hidden_size": 640, "num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}
_MINIMIND_3 = {
    "hidden_size": 768,
    "intermediate_size": 2432,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "use_qk_norm": True,
}
_MINIMIND_3_MOE = {**_MINIMIND_3, "num_experts": 4, "num_experts_per_tok": 1, "router_aux_loss_coef": 5e-4, "seq_aux": False}
_MINIMIND_3V = {"image_token_id": 12, "projector_num_layers": 2, "projector_layer_norm": True}

# The published models; sizes as in https://github.com/jingyaogong/minimind-v
_PRESETS: dict[str, dict[str, Any]] = {
    "minimind2-v-small": {"text_config": {}, "vision_config": _CLIP_VIT_B_16},
    "minimind2-v": {"text_config": {"hidden_size": 768, "num_hidden_layers": 16}, "vision_config": _CLIP_VIT_B_16},
    "minimind2-v-moe": {"text_config": _MINIMIND2_MOE, "vision_config": _CLIP_VIT_B_16},
    "minimind-3v": {"text_config": _MINIMIND_3, "vision_config": _SIGLIP2_VIT_B_32, **_MINIMIND_3V},
    "minimind-3v-moe": {"text_config": _MINIMIND_3_MOE, "vision_config": _SIGLIP2_VIT_B_32, **_MINIMIND_3V},
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
