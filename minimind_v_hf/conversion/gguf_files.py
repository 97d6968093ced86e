"""MiniMind-V in the tensors and keys of GGUF, for the graphs of llama.cpp.

llama.cpp has graphs of its own, and a file names the one that is to run. What none of them computes is refused, with the
reason; where one computes more than the model, weights undo it (`identity_through_gelu`).
"""

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import BaseImageProcessor, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_minimind_v import CONTROL_MARK, MiniMindVConfig, MiniMindVTextConfig
from .report import ConversionError


Tensors = Mapping[str, torch.Tensor]

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
_QUANT_BLOCK = 32  # consecutive weights of a row, which share a scale
_LARGEST_HALF = 2.0**15  # the largest power of two of half precision, in which a back end may multiply
_ROPE = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
_USE_GELU = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}  # by the encoder's hidden_act


@contextmanager
def _new_file(path: Path, architecture: gguf.MODEL_ARCH, name: str, dtype: str) -> Iterator[gguf.GGUFWriter]:
    """A writer to fill with keys and tensors, which are written at the end."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, dtype: str) -> None:
    """Add a tensor: vectors in float32, matrices in `dtype`, and in float16 where their rows do not fill its blocks."""
    if tensor.ndim == 1:
        dtype = "f32"
    elif dtype.startswith("q") and tensor.shape[-1] % _QUANT_BLOCK:
        dtype = "f16"
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    writer.add_tensor(name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)


def _target(names: gguf.TensorNameMap, source: str) -> str:
    target = names.get_name(source, try_suffixes=(".weight", ".bias"))
    if target is None:
        raise ConversionError(f"the package gguf has no name for {source}")
    return target


def check(
    config: MiniMindVConfig | MiniMindVTextConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor | None,
) -> None:
    """Raise a ConversionError where llama.cpp has no graph for a model, or would read text or images otherwise."""
    text = config.get_text_config()
    _architecture(text)
    _check_tokenizer(tokenizer, text.vocab_size)
    if isinstance(config, MiniMindVConfig):
        _check_encoder(config, image_processor)


# ── The decoder ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _architecture(text: MiniMindVTextConfig) -> gguf.MODEL_ARCH:
    """The graph of llama.cpp that is exactly a MiniMind decoder.

    Raises:
        ConversionError: none is.
    """
    if text.hidden_act != "silu":
        raise ConversionError(f"hidden_act is {text.hidden_act!r}, and these graphs of llama.cpp compute 'silu'")
    rope = text.rope_parameters
    if rope["rope_type"] not in ("default", "yarn") or rope.keys() - set(_ROPE):
        raise ConversionError(
            f"rope_parameters are {rope}: expected the rope_type 'default' or 'yarn', with {', '.join(_ROPE)}"
        )
    if not text.num_experts:
        return gguf.MODEL_ARCH.QWEN3 if text.use_qk_norm else gguf.MODEL_ARCH.LLAMA
    if text.num_shared_experts:
        if text.use_qk_norm:
            raise ConversionError("this decoder has shared experts and q/k norm, and no graph of llama.cpp like it has both")
        return gguf.MODEL_ARCH.BAILINGMOE
    if not text.norm_topk_prob:
        raise ConversionError("norm_topk_prob is False, and without shared experts llama.cpp always normalises those weights")
    return gguf.MODEL_ARCH.QWEN3MOE if text.use_qk_norm else gguf.MODEL_ARCH.LLAMA


def write_decoder(
    path: Path,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    generation: GenerationConfig,
    dtype: str,
) -> None:
    """Write the decoder of a MiniMind-V or a MiniMind that `check` has passed, with its tokenizer.

    Args:
        path: the file.
        name: of the model.
        model: in float32.
        tokenizer: the model's.
        chat_template: in Jinja.
        generation: how the model samples.
        dtype: "f32", "f16", "q8_0" or "q4_0", of the matrices.
    """
    text = model.config.get_text_config()
    architecture = _architecture(text)
    names = gguf.get_tensor_name_map(architecture, text.num_hidden_layers)
    with _new_file(path, architecture, name, dtype) as writer:
        _add_decoder_keys(writer, text)
        _add_tokenizer(writer, tokenizer, text.vocab_size)
        writer.add_chat_template(chat_template)
        if generation.do_sample:
            writer.add_sampling_temp(generation.temperature)
            writer.add_sampling_top_p(generation.top_p)
        for source, tensor in _decoder_tensors(model, architecture):
            target = _target(names, source)
            if ".mlp.gate." in source:  # the router: small, and a wrong choice of experts costs more than its bytes
                kind = "f32"
            elif dtype == "q4_0" and target in ("token_embd.weight", "output.weight"):
                kind = "q8_0"  # llama.cpp's own quantiser spends more on them, too
            else:
                kind = dtype
            _add_tensor(writer, target, tensor, kind)


def _add_decoder_keys(writer: gguf.GGUFWriter, text: MiniMindVTextConfig) -> None:
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    _add_rope(writer, text.head_dim, text.rope_parameters)
    if text.num_experts:
        writer.add_expert_count(text.num_experts)
        writer.add_expert_used_count(text.num_experts_per_tok)
        writer.add_expert_shared_count(text.num_shared_experts)
        writer.add_expert_feed_forward_length(text.moe_intermediate_size)
        writer.add_expert_weights_norm(text.norm_topk_prob)
        writer.add_expert_weights_scale(1.0)


def _add_rope(writer: gguf.GGUFWriter, head_dim: int, rope: Mapping[str, Any]) -> None:
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        # llama.cpp multiplies by what transformers takes by default
        default = 0.1 * math.log(rope["factor"]) + 1
        factor = rope.get("attention_factor")
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)
        writer.add_rope_scaling_attn_factors((default if factor is None else factor) / default)


def _decoder_tensors(model: PreTrainedModel, architecture: gguf.MODEL_ARCH) -> Iterator[tuple[str, torch.Tensor]]:
    """As the graph wants them: in `llama` and `bailingmoe` the two of a RoPE pair side by side; each matrix a tensor."""
    text = model.config.get_text_config()
    is_interleaved = architecture in (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.BAILINGMOE)
    takes_tied_head = architecture != gguf.MODEL_ARCH.BAILINGMOE
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", "model.")
        if name.startswith(("model.vision_tower.", "model.multi_modal_projector.")):
            continue
        if name == "lm_head.weight" and text.tie_word_embeddings and takes_tied_head:
            continue
        if is_interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = tensor.unflatten(0, (-1, 2, text.head_dim // 2))
            yield name, halves.transpose(1, 2).reshape(tensor.shape)
        elif name.endswith(".experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                yield name.replace("gate_up_proj", f"{part}.weight"), half
        elif name.endswith(".experts.down_proj"):
            yield f"{name}.weight", tensor
        else:
            yield name, tensor


# ── The tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for how a tokenizer splits text before it merges bytes.

    Raises:
        ConversionError: none of llama.cpp's splits like it.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = state["pre_tokenizer"] or {}
    if state["model"]["type"] != "BPE" or pre.get("type") != "ByteLevel" or pre["add_prefix_space"]:
        raise ConversionError("the tokenizer is no byte-level BPE as MiniMind's are")
    if pre["use_regex"]:
        return "gpt-2"
    # This one splits at numbers alone, which changes nothing where none is part of a longer token
    decoder = tokenizer.backend_tokenizer.decoder
    texts = [decoder.decode([token]) for token in state["model"]["vocab"]]
    if any(len(text) > 1 and any(unicodedata.category(c).startswith("N") for c in text) for text in texts):
        raise ConversionError("the tokenizer merges numbers with what is beside them, across words, as none of llama.cpp does")
    return "superbpe"


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise a ConversionError where llama.cpp would give other tokens."""
    _pre_tokenizer(tokenizer)
    normalizer = json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"]
    if normalizer not in (None, {"type": "Replace", "pattern": {"String": CONTROL_MARK}, "content": ""}):
        raise ConversionError(f"the tokenizer has a normalizer, {normalizer['type']}, for which a GGUF file has no place")
    if len(tokenizer) > vocab_size:
        raise ConversionError(f"the tokenizer has {len(tokenizer)} ids, and the embedding {vocab_size} rows")


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Add a tokenizer that `_check_tokenizer` has passed. Special tokens are control tokens: no text is taken for one."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[unused {number}]" for number in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for token in state["added_tokens"]:
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)


# ── The encoder ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_encoder(config: MiniMindVConfig, image_processor: BaseImageProcessor | None) -> None:
    """Raise a ConversionError where llama.cpp's LLaVA graph cannot be this encoder and projector, or its preprocessing."""
    vision = config.vision_config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ConversionError(f"the encoder is {vision.model_type}, and llama.cpp's LLaVA graph is one for CLIP and SigLIP")
    if vision.hidden_act not in _USE_GELU:
        raise ConversionError(f"the encoder's hidden_act is {vision.hidden_act!r}: expected one of {', '.join(_USE_GELU)}")
    if config.patches_per_token > 1:
        raise ConversionError(f"this projector joins {config.patches_per_token} patches, and llama.cpp's takes them one by one")
    if config.projector_num_layers == 2 and config.projector_hidden_act not in ("gelu", "gelu_pytorch_tanh"):
        raise ConversionError(f"projector_hidden_act is {config.projector_hidden_act!r}, and llama.cpp computes 'gelu'")
    factor = getattr(image_processor, "rescale_factor", 1.0) if getattr(image_processor, "do_rescale", False) else 1.0
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ConversionError(f"the image processor rescales by {factor}, and llama.cpp by 1/255")


def write_encoder(
    path: Path, name: str, model: PreTrainedModel, image_processor: BaseImageProcessor, dtype: str, class_token: str
) -> None:
    """Write encoder and projector of a MiniMind-V that `check` has passed, as an mmproj of the kind "mlp".

    Args:
        path: the file.
        name: of the model.
        model: in float32.
        image_processor: the model's.
        dtype: "f32" or "f16", of the matrices.
        class_token: "last" or "first", where the graph puts CLIP's class token.
    """
    config = model.config
    vision = config.vision_config
    tensors, projector = (
        _part(model.state_dict(), "model.vision_tower"),
        _part(model.state_dict(), "model.multi_modal_projector"),
    )
    encoder = {key: tensor for key, tensor in tensors.items() if not key.startswith(("head.", "post_layernorm."))}
    # MiniMind-V takes SigLIP's output after its last norm, and CLIP's before
    norms = [_part(tensors, "post_layernorm")] if vision.model_type == "siglip_vision_model" else []
    if config.projector_layer_norm:
        norms.append(_part(projector, "norm"))
    exact, layers = f"encoder.layers.{vision.num_hidden_layers}.", vision.num_hidden_layers
    if len(norms) == 2:  # and the graph has one
        encoder |= {exact + key: tensor for key, tensor in _norm_as_layer(**norms.pop(0)).items()}
        layers += 1
    if norms:
        encoder |= {f"post_layernorm.{key}": tensor for key, tensor in norms[0].items()}
    positions = "embeddings.position_embedding.weight"
    if "embeddings.class_embedding" in encoder and class_token == "last":
        encoder[positions] = encoder[positions].roll(-1, dims=0)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    with _new_file(path, gguf.MODEL_ARCH.MMPROJ, name, dtype) as writer:
        _add_encoder_keys(writer, config, layers)
        normalises = getattr(image_processor, "do_normalize", False)
        writer.add_vision_image_mean([float(mean) for mean in image_processor.image_mean] if normalises else [0.0] * 3)
        writer.add_vision_image_std([float(std) for std in image_processor.image_std] if normalises else [1.0] * 3)
        if "embeddings.class_embedding" in encoder:
            writer.add_string("minimind_v.class_token", class_token)
        for key, tensor in encoder.items():
            target = _target(names, f"vision_tower.vision_model.{key}")
            _add_tensor(writer, target, tensor, "f32" if key == positions or key.startswith(exact) else dtype)
        for key, tensor in _projector(config, projector).items():
            _add_tensor(writer, f"mm.{key}", tensor, dtype)


def _add_encoder_keys(writer: gguf.GGUFWriter, config: MiniMindVConfig, layers: int) -> None:
    vision = config.vision_config
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_projection_dim(config.get_text_config().hidden_size)
    writer.add_vision_use_gelu(_USE_GELU[vision.hidden_act])
    writer.add_array("clip.vision.feature_layer", [layers])  # without it the last layer is not run


def _part(tensors: Tensors, name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def identity_through_gelu(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two linear layers with GELU in between that are the one of `weight` (out, in) and `bias` (out,).

    GELU(x) - GELU(-x) = x, for the exact GELU and for its tanh form.

    Returns:
        Weight (2 out, in) and bias (2 out,) of the first layer, and the weight (out, 2 out) of the second.
    """
    one = torch.eye(len(weight))
    return torch.cat((weight, -weight)), torch.cat((bias, -bias)), torch.cat((one, -one), dim=1)


def _projector(config: MiniMindVConfig, tensors: Tensors) -> dict[str, torch.Tensor]:
    """By the names of LLaVA's two linear layers, which are 0 and 2, with GELU in between."""
    zeros = torch.zeros(config.get_text_config().hidden_size)
    first, second = _part(tensors, "linear_1"), _part(tensors, "linear_2")
    if config.projector_num_layers == 1:
        weight, bias, second["weight"] = identity_through_gelu(first["weight"], first.get("bias", zeros))
        first = {"weight": weight, "bias": bias}
    return {
        "0.weight": first["weight"],
        "0.bias": first.get("bias", zeros),
        "2.weight": second["weight"],
        "2.bias": second.get("bias", zeros),
    }


def _norm_as_layer(weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """A transformer layer that is a layer norm, as far as the layer norm after it can tell.

    Its attention gives nothing, and its feed-forward block a large multiple of the norm: beside it, the residual stream is
    small, and the norm that follows takes out the multiple.
    """
    width = len(weight)
    bound = float((weight.abs() * width**0.5 + bias.abs()).max())  # of what a layer norm can give
    scale = 2.0 ** math.floor(math.log2(_LARGEST_HALF / bound))
    zeros, nothing = torch.zeros(width), torch.zeros(width, width)
    up, up_bias, down = identity_through_gelu(scale * torch.eye(width), zeros)
    layer = {"layer_norm1.weight": zeros, "layer_norm1.bias": zeros, "layer_norm2.weight": weight, "layer_norm2.bias": bias}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= {f"self_attn.{name}.weight": nothing, f"self_attn.{name}.bias": zeros}
    return layer | {"mlp.fc1.weight": up, "mlp.fc1.bias": up_bias, "mlp.fc2.weight": down, "mlp.fc2.bias": zeros}
