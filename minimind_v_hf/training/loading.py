"""What a training script starts from, as its arguments say: the first model, and the data."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessorPil,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.utils import logging

from ..chat import refuse_other_weights
from ..configuration_minimind_v import IMAGE_PLACEHOLDER, MiniMindVConfig
from ..data import DataReport, MiniMindVCollator, load_conversations, pack, tokenize_conversations
from ..data.images import read_image
from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from ..preparation import (
    build_chat_template,
    has_independent_turns,
    prepare_tokenizer,
    rebuild_chat_template,
    train_tokenizer,
)
from ..processing_minimind_v import MiniMindVProcessor
from .arguments import RunArguments
from .features import CachedFeaturesCollator, cache_features


logger = logging.get_logger(__name__)


# ── The model ──


@contextlib.contextmanager
def _loading(source: str | None) -> Iterator[None]:
    """Around the loading of a folder or Hub id: a damaged file may raise anything in the libraries that read it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"Cannot load {source}: {error}") from error


def _load_whole(auto_class: Any, source: str) -> Any:
    """The model of an encoder or a language model, in float32 with all of its weights; others may lie beside them.

    Raises:
        ValueError: it cannot be loaded, or lacks weights.
    """
    with _loading(source):
        model, info = auto_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{source} lacks {len(missing)} of its weights, such as {missing[0]}.")
    return model


@contextlib.contextmanager
def _whole_weights(args: TrainingArguments) -> Iterator[None]:
    """Around the loading of a model: each process gets all of it under ZeRO-3 too, whose engine shards it later.

    Until then weights are put together, counted and hashed.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        args.deepspeed_plugin.set_deepspeed_weakref()


def load_start(run: RunArguments, args: TrainingArguments) -> tuple[MiniMindVForConditionalGeneration, MiniMindVProcessor]:
    """The model and the processor to start from, as the arguments say: trained ones, or fresh weights put together.

    Raises:
        ValueError: they do not fit each other.
    """
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    with _whole_weights(args):
        return _load_start(run, args)


def _load_start(run: RunArguments, args: TrainingArguments) -> tuple[MiniMindVForConditionalGeneration, MiniMindVProcessor]:
    if run.model is not None:
        if os.path.isdir(run.model) and not os.path.isfile(os.path.join(run.model, "config.json")):
            raise ValueError(f"Cannot load {run.model}: the folder has no config.json.")
        with _loading(run.model):
            processor = AutoProcessor.from_pretrained(run.model)
            model, info = MiniMindVForConditionalGeneration.from_pretrained(
                run.model, dtype=torch.float32, output_loading_info=True
            )
        refuse_other_weights(run.model, model, info)
        return model, processor

    config = _load_config(run)
    processor = _load_processor(run, args, config)
    config.image_token_id = processor.image_token_id
    if (size := len(processor.tokenizer)) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {size} tokens, but the configuration has a vocabulary of {config.text_config.vocab_size}."
        )
    if processor.image_seq_length != config.image_seq_length:
        raise ValueError(
            f"The processor of {run.processor} makes {processor.image_seq_length} tokens of an image, but --config "
            f"{run.config} expects {config.image_seq_length}: give a processor for its encoder, or a tokenizer alone."
        )
    set_seed(args.seed)
    model = MiniMindVForConditionalGeneration(config)
    if run.vision_tower is not None:
        tower = _load_whole(AutoModel, run.vision_tower)
        _take_weights(model.model.vision_tower, getattr(tower, "vision_model", tower), run.vision_tower)
    if run.language_model is not None:
        language_model = _load_whole(AutoModelForCausalLM, run.language_model)
        _take_weights(model.model.language_model, language_model.base_model, run.language_model)
        _take_weights(model.lm_head, language_model.get_output_embeddings(), run.language_model)
    return model, processor


def _take_weights(module: torch.nn.Module, other: torch.nn.Module, source: str) -> None:
    try:
        module.load_state_dict(other.state_dict())
    except RuntimeError as error:
        raise ValueError(f"The weights of {source} do not fit --config: {error}") from error


def _load_config(run: RunArguments) -> MiniMindVConfig:
    if isinstance(run.config, dict):
        return _config_of(run.config)
    if run.config in MiniMindVConfig.presets():
        return MiniMindVConfig.from_preset(run.config)
    return MiniMindVConfig.from_pretrained(run.config)


def _config_of(given: dict[str, Any]) -> MiniMindVConfig:
    """The configuration with these fields. Raises a ValueError for one that there is not: transformers would keep it unread."""
    config = MiniMindVConfig(**{"image_token_id": 0} | given)  # which the tokenizer decides
    parts = {"config": config, "text_config": config.text_config, "vision_config": config.vision_config}
    for name, part in parts.items():
        names = (given.get(name) or {}) if name != "config" else given
        others = {"model_type", "image_size", "patch_size"} if name == "vision_config" else {"model_type"}
        if unknown := sorted(names.keys() - others - {known.name for known in fields(part)}):
            raise ValueError(f"{name}: there is no field {', '.join(unknown)} in a {type(part).__name__}.")
    return config


def _load_processor(run: RunArguments, args: TrainingArguments, config: MiniMindVConfig) -> MiniMindVProcessor:
    if run.processor is None:
        with args.main_process_first(desc="looking at the training data"):
            rows = load_conversations(run.data_files, run.image_folder, max_dropped=run.max_dropped, strict=run.strict)
            loaded = _train_tokenizer(rows, config.text_config.vocab_size)
        config.image_token_id = loaded.image_token_id
    else:
        with _loading(run.processor):
            loaded = AutoProcessor.from_pretrained(run.processor)
    if isinstance(loaded, ProcessorMixin):
        return loaded
    if run.vision_tower is not None:
        with _loading(run.vision_tower):
            image_processor = AutoImageProcessor.from_pretrained(run.vision_tower)
    else:
        side = config.vision_config.image_size
        size = {"height": side, "width": side}  # the whole image, whatever its shape
        pixels = _mean_and_std(rows.shuffle(args.seed), side) if run.processor is None else {}
        image_processor = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, **pixels)
    return MiniMindVProcessor.build(image_processor, loaded, config)


def _train_tokenizer(rows: Dataset, vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer of at most so many tokens, for the text of the training data."""
    texts = (message["content"] for row in rows.select_columns("conversations") for message in row["conversations"])
    template_words = ["user\n", "assistant\n"] * 1000
    tokenizer = train_tokenizer(itertools.chain(texts, template_words), vocab_size)
    return prepare_tokenizer(tokenizer, build_chat_template(IMAGE_PLACEHOLDER, default_system=None, thinking=False))


def _mean_and_std(rows: Dataset, side: int) -> dict[str, list[float]]:
    """What brings the colours of the images of the first rows to mean 0 and variance 1; nothing if there are no images.

    Of bright images a fresh encoder would see little but their brightness.
    """
    sources = [source for sources in rows.select(range(min(256, len(rows))))["images"] for source in sources]
    if not sources:
        return {}
    pixels = np.stack([np.asarray(read_image(source, side).resize((side, side))) for source in sources]) / 255
    std = np.maximum(pixels.std((0, 1, 2)), 0.01)
    return {"image_mean": pixels.mean((0, 1, 2)).tolist(), "image_std": std.tolist()}


# ── The data ──


@dataclass
class TrainingData:
    """What a training script reads: rows for the Trainer, held-out rows, and what was counted on the way."""

    train: Any
    held_out: Any = None
    held_out_conversations: Any = None
    reports: dict[str, DataReport] = field(default_factory=dict)


def load_data(run: RunArguments, args: TrainingArguments, processor: MiniMindVProcessor) -> TrainingData:
    """Read, mend, count and tokenise the training and the held-out data, once for all processes, and pack on demand."""
    data = TrainingData(train=None, reports={} if run.streaming else {"training": DataReport()})
    checks: dict[str, Any] = {"strict": run.strict, "max_dropped": run.max_dropped}
    augmentations: dict[str, Any] = {
        "random_system": run.random_system,
        "drop_empty_thinking": run.drop_empty_thinking,
        "seed": args.seed,
    }
    with args.main_process_first(desc="reading the data"):
        report = data.reports.get("training")
        rows = load_conversations(run.data_files, run.image_folder, streaming=run.streaming, report=report, **checks)
        if run.streaming:
            rows = rows.shuffle(args.seed, buffer_size=1000)  # alike in all processes, and again in a run that is resumed
        data.train = tokenize_conversations(rows, processor, run.max_length, report=report, **augmentations)
        if run.eval_files:
            report = data.reports["held out"] = DataReport()
            data.held_out_conversations = load_conversations(run.eval_files, run.image_folder, report=report, **checks)
            data.held_out = tokenize_conversations(data.held_out_conversations, processor, run.max_length, report=report)
    if run.pack_length:
        data.train = pack(data.train, run.pack_length, args.seed)
    if run.streaming:
        if next(iter(data.train), None) is None:
            raise ValueError(f"The data set has nothing to learn from within max_length={run.max_length}.")
        data.train = data.train.repeat(None)  # a resumed run finds its place, also after the first pass
    if args.should_log:
        for name, report in data.reports.items():
            print(f"{name}: {report}")
    return data


def make_collator(
    run: RunArguments,
    args: TrainingArguments,
    processor: MiniMindVProcessor,
    model: MiniMindVForConditionalGeneration,
    data: TrainingData,
    uint8_pixels: bool = True,
    independent_turns: bool = False,
) -> MiniMindVCollator | CachedFeaturesCollator:
    """The collator of a training script: gives pixels, or, with `cache_features`, the encoder's output.

    The processor's chat template then asks as the turns were trained: apart, or with those before.
    """
    template = processor.chat_template
    if independent_turns != has_independent_turns(template):
        rebuilt = rebuild_chat_template(template, independent_turns=independent_turns)
        if rebuilt is None:
            logger.warning("The chat template is not ours, so prompts hold all turns: ask each question by itself.")
        processor.chat_template = processor.tokenizer.chat_template = rebuilt or template
    max_dropped = run.max_dropped if run.streaming and not run.strict else None
    collator = MiniMindVCollator(
        processor, uint8_pixels=uint8_pixels, max_dropped=max_dropped, independent_turns=independent_turns
    )
    if not run.cache_features:
        return collator
    sets = [getattr(rows, "dataset", rows) for rows in (data.train, data.held_out) if rows is not None]
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    with args.main_process_first(desc="opening the cache of features"):
        return cache_features(model, collator, sets, run.cache_features, dtype)
