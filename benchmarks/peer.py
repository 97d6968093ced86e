"""What both benchmarks stand on: a tokenizer of MiniMind's size, our processor, and transformers' LLaVA in our dimensions."""

import random

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from minimind_v_hf import MiniMindVConfig, MiniMindVForConditionalGeneration, MiniMindVProcessor
from minimind_v_hf.preparation import prepare_tokenizer, train_tokenizer


def make_words(rng: random.Random) -> list[str]:
    """4000 words of 2 to 8 letters."""
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(4000)]


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of 6400 entries, MiniMind's number."""
    return prepare_tokenizer(train_tokenizer([" ".join(words)] * 2, vocab_size=6400))


def make_processor(tokenizer: PreTrainedTokenizerFast) -> MiniMindVProcessor:
    config = MiniMindVConfig.from_preset("minimind2-v-small", image_token_id=tokenizer.image_token_id)
    return MiniMindVProcessor.build(CLIPImageProcessorPil(), tokenizer, config)


def make_model(processor: MiniMindVProcessor, preset: str = "minimind2-v-small") -> MiniMindVForConditionalGeneration:
    torch.manual_seed(0)
    return MiniMindVForConditionalGeneration(MiniMindVConfig.from_preset(preset, image_token_id=processor.image_token_id))


def make_llava(image_token_id: int) -> LlavaForConditionalGeneration:
    """LLaVA with MiniMind2-V small's decoder and encoder; its own projector of two layers has 0.3M parameters more."""
    text = MiniMindVConfig.from_preset("minimind2-v-small").text_config
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=224, patch_size=16),
            text_config=LlamaConfig(
                **{name: getattr(text, name) for name in (*shape, "num_key_value_heads", "rms_norm_eps")},
                max_position_embeddings=text.max_position_embeddings,
                tie_word_embeddings=True,
            ),
            image_token_index=image_token_id,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    )


def make_llava_processor(ours: MiniMindVProcessor) -> LlavaProcessor:
    return LlavaProcessor(
        CLIPImageProcessorPil(),
        ours.tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=ours.tokenizer.image_token,
    )
