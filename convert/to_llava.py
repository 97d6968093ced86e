"""A converted folder to a model that transformers and others know without our code, where that is exactly possible.

    python convert/to_llava.py --model MiniMind2-Small-V --output MiniMind2-Small-V-llava

MiniMind2-V becomes LLaVA: its projector of one linear layer is followed by an identity. A MiniMind language model alone
becomes Llama, with q/k norm Qwen3, and with q/k norm and experts Qwen3-MoE. Other models are refused, with the reason.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from convert.native_files import ConversionError
from convert.output import (
    check_output,
    largest_difference,
    new_folder,
    open_folder,
    run_in_fresh_process,
    sample_inputs,
    save_model,
)
from convert.report import print_table, run
from convert.to_native import load_config
from minimind_v_hf import (
    MiniMindForCausalLM,
    MiniMindVConfig,
    MiniMindVForConditionalGeneration,
    MiniMindVProcessor,
    MiniMindVTextConfig,
)


TOLERANCE = 1e-5  # of the logits
NEW_TOKENS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and convert. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder of a MiniMind-V or MiniMind model of this package")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there already")
    arguments = parser.parse_args(argv)
    return run(lambda: convert(arguments))


def convert(arguments: argparse.Namespace) -> None:
    """The whole conversion, from the arguments of the command line.

    Raises:
        ConversionError: no stock model is exactly this one, or the folder is incomplete. Nothing is written then.
    """
    folder = arguments.model
    check_output(arguments.output, arguments.overwrite, [folder])
    config = load_config(folder)
    has_eyes = isinstance(config, MiniMindVConfig)
    stock_config = stock_llava_config(config) if has_eyes else stock_text_config(config)
    ours = (
        (MiniMindVForConditionalGeneration if has_eyes else MiniMindForCausalLM)
        .from_pretrained(folder, dtype=torch.float32)
        .eval()
    )
    stock = fill(stock_config, ours, folder)
    stock.generation_config = ours.generation_config

    with new_folder(arguments.output) as staging:
        # As published LLaVAs have it: transformers 5 reads it with and without `vision_model`, vLLM's LLaVA only with
        tower = "model.vision_tower."
        state_dict = {name.replace(tower, f"{tower}vision_model."): tensor for name, tensor in stock.state_dict().items()}
        save_model(stock, staging, stock.lm_head.weight.dtype, state_dict)
        if has_eyes:
            stock_processor(MiniMindVProcessor.from_pretrained(folder), stock_config).save_pretrained(staging)
        elif (folder / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(folder).save_pretrained(staging)
        difference = verify(ours, staging)
    counts = sum(parameter.numel() for parameter in stock.parameters())
    rows = [("model", type(stock).__name__), ("decoder", stock_config.get_text_config().model_type)]
    rows += [("parameters", f"{counts / 1e6:.1f}M"), ("dtype", str(stock.lm_head.weight.dtype).removeprefix("torch."))]
    rows += [("checked", f"logits differ by {difference:.1e} at most, {NEW_TOKENS} greedy tokens are equal")]
    print_table(f"{folder} as a stock model", rows)
    print(f"\nWritten to {arguments.output}")


def stock_text_config(text: MiniMindVTextConfig) -> PreTrainedConfig:
    """The Llama, Qwen3 or Qwen3-MoE that is exactly a MiniMind decoder.

    Raises:
        ConversionError: none is.
    """
    shared = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "rope_parameters",
        "attention_dropout",
        "tie_word_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    fields = {name: getattr(text, name) for name in shared}
    if not getattr(text, "num_experts", 0):
        return Qwen3Config(**fields) if text.use_qk_norm else LlamaConfig(**fields)
    if text.num_shared_experts:
        raise ConversionError("this mixture of experts has a shared expert, and Llama, Qwen3 and Qwen3-MoE have none")
    if not text.use_qk_norm:
        raise ConversionError("this mixture of experts has no q/k norm, and Qwen3-MoE always has it")
    moe = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef")
    return Qwen3MoeConfig(**fields, **{name: getattr(text, name) for name in moe})


def stock_llava_config(config: MiniMindVConfig) -> LlavaConfig:
    """The LLaVA that is exactly a MiniMind-V.

    Raises:
        ConversionError: LLaVA cannot hold this model.
    """
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


def fill(stock_config: PreTrainedConfig, ours: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The stock model with our weights, which have the same names there, in the dtypes that the folder stores."""
    with init_empty_weights(include_buffers=False):
        is_llava = isinstance(stock_config, LlavaConfig)
        stock = LlavaForConditionalGeneration(stock_config) if is_llava else AutoModelForCausalLM.from_config(stock_config)
    state_dict = dict(ours.state_dict())
    if is_llava and ours.config.projector_num_layers == 1:
        width = stock_config.text_config.hidden_size
        state_dict["model.multi_modal_projector.linear_2.weight"] = torch.eye(width)
        if stock_config.multimodal_projector_bias:
            state_dict["model.multi_modal_projector.linear_2.bias"] = torch.zeros(width)
    with open_folder(folder) as (names, tensor_of):
        dtypes = {name: tensor_of(name).dtype for name in names}
    default = dtypes[next(name for name in dtypes if name.endswith("embed_tokens.weight"))]
    state_dict = {name: tensor.to(dtypes.get(name, default)) for name, tensor in state_dict.items()}
    stock.load_state_dict(state_dict, strict=True, assign=True)
    stock.tie_weights()
    return stock.eval()


def stock_processor(processor: MiniMindVProcessor, config: LlavaConfig) -> LlavaProcessor:
    """LLaVA's processor, with our tokenizer and chat template."""
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


def verify(ours: PreTrainedModel, folder: Path) -> float:
    """Load the folder in a fresh process, without our code, and compare.

    Returns:
        The largest difference of the logits.

    Raises:
        ConversionError: the folder does not load, or gives other logits or tokens.
    """
    inputs = sample_inputs(ours.config)
    with torch.no_grad():
        logits = ours(**inputs).logits
        tokens = ours.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    auto_class = "AutoModelForImageTextToText" if "pixel_values" in inputs else "AutoModelForCausalLM"
    result = run_in_fresh_process(folder, inputs, auto_class, remote_code=False, new_tokens=NEW_TOKENS)
    difference = largest_difference(result["logits"], logits)
    if difference > TOLERANCE or not torch.equal(result["tokens"], tokens):
        raise ConversionError(f"the stock model gives other answers: its logits differ by {difference:.2e}")
    return difference


if __name__ == "__main__":
    sys.exit(main())
