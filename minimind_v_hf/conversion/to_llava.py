"""A converted folder to a model that transformers and others know without our code, where that is exactly possible."""

import math
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ..configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig
from ..processing_minimind_v import MiniMindVProcessor
from .folders import check_output, new_folder, read_model_folder, read_processor
from .report import ConversionError
from .verification import sample_inputs, verify


SHARED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters"),
    *("attention_dropout", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)
_MOE_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef")


def convert(model: str | Path, output: str | Path, *, gelu: bool = False, overwrite: bool = False) -> None:
    """Write the stock model, in the dtypes of the folder, and compare its answers with ours in a fresh process.

    Args:
        model: folder of a MiniMind-V or MiniMind model of this package.
        output: the folder to write.
        gelu: a projector of one layer becomes one with a GELU, and all weights float32, for engines that always compute it.
        overwrite: replace a model folder that is there already.

    Raises:
        ConversionError: no stock model is exactly this one, the folder is damaged, or the model has no such projector.
            Nothing is written then.
    """
    folder, output = Path(model), Path(output)
    check_output(output, overwrite, [folder])
    ours = read_model_folder(folder)
    config = ours.config
    is_llava = isinstance(config, MiniMindVConfig)
    stock_config = stock_llava_config(config) if is_llava else stock_text_config(config)
    has_one_layer = is_llava and config.projector_num_layers == 1
    if gelu and not has_one_layer:
        raise ConversionError("--gelu is for a projector of one layer, and this model has none")
    if gelu:  # which half precision would spoil: see gelu_shift
        ours = ours.float()
        stock_config.projector_hidden_act, stock_config.multimodal_projector_bias = "gelu", True
    tensors = ours.state_dict()

    with init_empty_weights(include_buffers=False):
        stock = LlavaForConditionalGeneration(stock_config) if is_llava else AutoModelForCausalLM.from_config(stock_config)
    if has_one_layer:
        add_second_layer(tensors, stock_config.multimodal_projector_bias, gelu_shift(ours) if gelu else 0.0)
    stock.load_state_dict(tensors, strict=True, assign=True)  # the names are the same
    stock.tie_weights()
    processor, stock.generation_config = read_processor(folder, config)
    if is_llava:
        processor = stock_processor(processor, stock_config)

    with new_folder(output) as staging:
        # As published LLaVAs have it: transformers 5 reads it with and without `vision_model`, vLLM's LLaVA only with
        tower = "model.vision_tower."
        state_dict = {name.replace(tower, f"{tower}vision_model."): tensor for name, tensor in stock.state_dict().items()}
        stock.save_pretrained(staging, state_dict=state_dict)
        stock.config.dtype = stock.lm_head.weight.dtype  # transformers writes that of the first tensor, which is the encoder's
        stock.config.save_pretrained(staging)
        processor.save_pretrained(staging)
        difference = verify(ours, staging, remote_code=False)
    print(f"{type(stock).__name__}, with the decoder {stock_config.get_text_config().model_type}, in {stock.config.dtype}.")
    print(f"Its logits differ by {difference:.1e} at most, and its greedy tokens are equal.")
    print(f"Written to {output}")


def add_second_layer(tensors: dict[str, torch.Tensor], bias: bool, shift: float) -> None:
    """Follow the projector's one layer by an identity, between which values are shifted by a constant."""
    first, second = (f"model.multi_modal_projector.linear_{number}" for number in (1, 2))
    like = tensors[f"{first}.weight"]
    zeros = like.new_zeros(len(like))
    tensors[f"{second}.weight"] = torch.eye(len(like), dtype=like.dtype)
    if bias:
        tensors[f"{first}.bias"] = tensors.get(f"{first}.bias", zeros) + shift
        tensors[f"{second}.bias"] = zeros - shift


def gelu_shift(model: PreTrainedModel) -> float:
    """A constant by which the projector's values come to where GELU(x) = x, which in float32 it is from 6 on.

    The larger, the more digits it costs: at 64, values keep 2e-6, and in bfloat16 0.25. So it is the power of two from four
    times of what images of noise, black and white give.
    """
    noise = sample_inputs(model.config)["pixel_values"]
    with torch.no_grad():
        values = model.get_image_features(
            torch.cat((noise, torch.full_like(noise, -3), torch.full_like(noise, 3)))
        ).pooler_output
    return 2.0 ** math.ceil(math.log2(4 * float(values.abs().max()) + 8))


def stock_text_config(text: MiniMindVTextConfig) -> PreTrainedConfig:
    """The Llama, Qwen3 or Qwen3-MoE that is exactly a MiniMind decoder. Raises ConversionError where none is."""
    fields = {name: getattr(text, name) for name in SHARED_FIELDS}
    config: PreTrainedConfig
    if not text.num_experts:
        config = Qwen3Config(**fields) if text.use_qk_norm else LlamaConfig(**fields)
    elif text.num_shared_experts:
        raise ConversionError("this mixture of experts has a shared expert, and Llama, Qwen3 and Qwen3-MoE have none")
    elif not text.use_qk_norm:
        raise ConversionError("this mixture of experts has no q/k norm, and Qwen3-MoE always has it")
    else:
        config = Qwen3MoeConfig(**fields, **{name: getattr(text, name) for name in _MOE_FIELDS})
    config.rope_theta = text.rope_parameters["rope_theta"]  # where transformers 4 and mlx-vlm look for it
    return config


def stock_llava_config(config: MiniMindVConfig) -> LlavaConfig:
    """The LLaVA that is exactly a MiniMind-V. Raises ConversionError where LLaVA cannot hold it."""
    if config.projector_layer_norm:
        raise ConversionError("this projector begins with a LayerNorm (minimind-3v), and LLaVA's has none")
    if config.patches_per_token > 1:
        raise ConversionError(f"this projector joins {config.patches_per_token} patches, and LLaVA's takes them one by one")
    if config.vision_config.model_type != "clip_vision_model":
        raise ConversionError(
            f"the encoder is {config.vision_config.model_type}: LLaVA takes what its last layer gives, before the last "
            "layer norm, and drops a class token. Only of CLIP is that what MiniMind-V takes"
        )
    return LlavaConfig(
        text_config=stock_text_config(config.text_config),
        vision_config=config.vision_config,
        image_token_index=config.image_token_id,
        image_seq_length=config.image_seq_length,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # without the class token
        projector_hidden_act="linear" if config.projector_num_layers == 1 else config.projector_hidden_act,
        multimodal_projector_bias=config.multimodal_projector_bias,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def stock_processor(processor: MiniMindVProcessor, config: LlavaConfig) -> LlavaProcessor:
    """LLaVA's processor with our tokenizer and chat template."""
    # The way to our code
    processor.image_processor.__dict__.pop("auto_map", None)
    processor.tokenizer.init_kwargs.pop("auto_map", None)
    return LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy above takes off again
    )
