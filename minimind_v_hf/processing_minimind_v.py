"""MiniMindVProcessor: images and chat messages in, `input_ids` and `pixel_values` out.

Three things happen here that an image processor and a tokenizer do not do by themselves:

* Images of every kind (paths, URLs, arrays; palette, CMYK, 16-bit, rotated) become RGB as a person sees them, and videos
  become images: see image_reading_minimind_v.py and video_reading_minimind_v.py.
* `<image>` in a prompt becomes one image token for each vector that the model makes of an image; `<video>` becomes one such
  run for each frame.
* What a user types is text. The chat template puts a mark into anything in a message that looks like a control token,
  `<|im_start|>` say; the marked string is not recognised as one, and the tokenizer's normalizer takes the mark out again.

This file is copied into every saved model folder. It depends on torch, transformers, Pillow and jinja2; videos need PyAV.
"""

import json
import math
import re
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateSyntaxError
from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TextInput
from transformers.utils import logging
from transformers.video_utils import VideoInput

from .configuration_minimind_v import CONTROL_MARK, IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from .image_reading_minimind_v import MAX_ASPECT_RATIO, check_array, load_batch, load_image
from .video_reading_minimind_v import MAX_NUM_FRAMES, is_video, load_video


logger = logging.get_logger(__name__)

MAX_IMAGE_SIDE = 8192
"""Pixels: more than any encoder takes."""

MAX_IMAGE_SEQ_LENGTH = 65_536
"""More tokens than any encoder of square images makes: a number in a damaged file must not exhaust the memory."""


class MiniMindVProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """The keyword arguments of `MiniMindVProcessor.__call__`."""

    _defaults = {
        "text_kwargs": {"padding": False, "return_mm_token_type_ids": False, "return_text_replacement_offsets": False},
    }


class MiniMindVProcessor(ProcessorMixin):
    r"""Image processor and tokenizer in one, and the chat template that joins them.

    `ProcessorMixin.__call__` does the work, and calls these hooks in this order:

    1. `prepare_inputs_layout`  reads images and videos, and checks that there is one for each placeholder
    2. `validate_inputs`        checks what is left to check
    3. `_process_images`        (inherited) calls the image processor, and for each image
       `replace_image_token`    tells what stands in the prompt in place of its placeholder
    4. `_process_videos`        tells the same of each video
    5. `get_text_with_replacements` (inherited) puts them in, and the tokenizer makes ids of the text

    `apply_chat_template` (inherited) renders messages, collects their images and videos, and calls the processor with both.

    Args:
        image_processor: any image processor of transformers that gives `pixel_values` of the encoder's size.
        tokenizer: a fast tokenizer with an image token that takes out control marks, as `build` prepares it.
        chat_template: a Jinja template.
        image_seq_length: image tokens per image, `config.image_seq_length` of the model; by default that of MiniMind2-V.

    Raises:
        ValueError: the tokenizer is not prepared, or `image_seq_length` is no number of tokens.
    """

    valid_processor_kwargs = MiniMindVProcessorKwargs
    _auto_class = "AutoProcessor"
    image_token: str
    video_token = VIDEO_PLACEHOLDER  # which becomes runs of image tokens, so it has no id
    video_processor = None  # to transformers this says that videos are understood: their frames go to the image processor

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, image_seq_length=196, **kwargs):
        if type(image_seq_length) is not int or not 1 <= image_seq_length <= MAX_IMAGE_SEQ_LENGTH:
            raise ValueError(f"image_seq_length={image_seq_length!r}: expected an integer from 1 to {MAX_IMAGE_SEQ_LENGTH}.")
        self.image_seq_length = image_seq_length
        _check_image_processor(image_processor)
        image_token = getattr(tokenizer, "image_token", None)
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        if image_token is None or normalizer is None or normalizer.normalize_str(CONTROL_MARK):
            raise ValueError(
                f"tokenizer: expected one with an image token that takes out control marks, got {type(tokenizer).__name__} "
                "without. Give it to MiniMindVProcessor.build, or to minimind_v_hf.preparation.prepare_tokenizer first."
            )
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def build(
        cls, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
    ) -> "MiniMindVProcessor":
        """A new processor, for a model that is created or converted; a saved one is loaded by `from_pretrained`.

        Args:
            image_processor: any image processor of transformers that gives `pixel_values` of the encoder's size.
            tokenizer: a fast tokenizer. A copy of it gets an image token and a chat template, unless it is one that
                `minimind_v_hf.preparation.prepare_tokenizer` made.
            config: `MiniMindVConfig` of the model.

        Raises:
            ImportError: the package minimind_v_hf is not installed: saved folders do not hold this code.
            ValueError: the tokenizer is not a fast one, or its image token has another id than the model's.
        """
        try:
            from minimind_v_hf.preparation import prepare_tokenizer
        except ImportError as error:
            raise ImportError("MiniMindVProcessor.build needs the package minimind_v_hf.") from error
        tokenizer = prepare_tokenizer(tokenizer)
        processor = cls(image_processor, tokenizer, tokenizer.chat_template, config.image_seq_length)
        if processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"The image token {processor.image_token!r} of the tokenizer has the id {processor.image_token_id}, but "
                f"config.image_token_id is {config.image_token_id}: expected the same."
            )
        return processor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in `ProcessorMixin`. Raises OSError where a file is damaged."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise OSError(
                f"{pretrained_model_name_or_path}: processor_config.json, tokenizer_config.json, tokenizer.json or "
                f"chat_template.jinja is damaged ({type(error).__name__}: {error}). Save or fetch the folder again."
            ) from error

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        videos: VideoInput | None = None,
        audio: None = None,
        **kwargs: Unpack[MiniMindVProcessorKwargs],
    ) -> BatchFeature:
        """Prepare prompts, their images and their videos for the model.

        Args:
            images: an image, a list of them in the order of their placeholders, or a list per sample. See `load_image`.
            text: a prompt with one `<image>` per image and one `<video>` per video, or a list of prompts.
            videos: a video, a list of them, or a list per sample; a frame of each second becomes an image. See `load_video`.
            audio: None: MiniMind-V takes no sound.
            kwargs: of the tokenizer (`padding=True`, …), of the image processor, `num_frames` (of a video at most), and
                `return_tensors`.

        Returns:
            `input_ids` and `attention_mask` (batch, tokens), and `pixel_values` (images in the whole batch, 3, height, width).

        Raises:
            ValueError: an image or a video cannot be read, they and their placeholders do not match in number, a prompt is
                empty, or audio is given.
            ImportError: a video is given, and PyAV is not installed.
        """
        return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Load the images and videos, put all in the order of their placeholders, and check that the counts match.

        Returns:
            images (with the frames of the videos), text, videos (each a list of its frames), audio.

        Raises:
            ValueError: an image or video cannot be read, or a sample has more or fewer of them than placeholders. The
                message names it and the sample, both counted from 0.
        """
        if audio is not None:
            raise ValueError("audio: expected None. MiniMind-V takes images and videos, and no sound.")
        if text is not None:
            text = self._check_prompts([text] if isinstance(text, str) else text)
        image_counts, video_counts = self._count(text, self.image_token), self._count(text, VIDEO_PLACEHOLDER)
        nothing: list[list] = [[] for _ in text or []]
        images = self._load_images(nothing if images is None else images, image_counts, kwargs) or None
        if videos is not None:
            videos = self._load_videos(videos, video_counts, kwargs)
            images = self._in_order(text, images or [], videos)
        elif images is None:
            load_batch(nothing, True, video_counts, "video", load_video)  # refuses placeholders
        elif any(video_counts or []):  # transformers' processors let it pass beside images
            logger.warning("There are <video> placeholders, but no videos were passed: they stay text.")
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Check what `prepare_inputs_layout` has not: it counted the images."""
        text = None if images is not None else text
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What stands in the prompt for one image."""
        return self.image_token * self.image_seq_length

    def _process_videos(self, videos: list[list], **kwargs) -> tuple[dict, list[str]]:
        """What stands in the prompt for each video; its frames are among the images already."""
        return {}, [self.replace_image_token({}, 0) * len(frames) for frames in videos]

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As in `ProcessorMixin`.

        Raises:
            ValueError: the conversation is no list of messages, or the template itself cannot be read.
        """
        is_batch = isinstance(conversation, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in conversation)
        for messages in conversation if is_batch else [conversation]:
            _check_conversation(messages)
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)
        except RecursionError as error:
            raise ValueError("conversation: it is nested too deeply.") from error
        except TemplateSyntaxError as error:
            folder = self.tokenizer.name_or_path or "this processor"
            raise ValueError(f"The chat template of {folder} is damaged: line {error.lineno}: {error.message}") from error

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write the processor, with its code and chat template, into a folder."""
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.__dict__.pop("auto_map", None)  # which saving leaves behind, so that a processor would differ from its copy
        return files

    def _get_num_multimodal_tokens(self, image_sizes: Iterable | None = None, **kwargs) -> MultiModalData:
        """Tokens and rows of pixels for images of these (height, width); for engines that plan ahead, such as vLLM."""
        if image_sizes is None:
            return MultiModalData()
        count = len(list(image_sizes))
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    # ── What the first hook is made of ──

    def _check_prompts(self, text: Any) -> list[str]:
        if not isinstance(text, (list, tuple)) or not all(isinstance(sample, str) for sample in text) or not text:
            raise ValueError(f"text: expected a string or a list of strings, got {type(text).__name__} {text!r:.99}.")
        for number, sample in enumerate(text):
            if not sample:
                raise ValueError(f"text: prompt {number} (counted from 0) is empty: expected at least a character.")
            if sample != sample.encode(errors="replace").decode():
                raise ValueError(f"text: prompt {number} (counted from 0) holds half a surrogate pair, which is no character.")
        return [sample.replace(IMAGE_PLACEHOLDER, self.image_token) for sample in text]

    @staticmethod
    def _count(text: list[str] | None, placeholder: str) -> list[int] | None:
        return None if text is None else [sample.count(placeholder) for sample in text]

    def _load_images(self, images: Any, placeholders: list[int] | None, kwargs: dict) -> list:
        """All images in one list; `placeholders` are the counts per sample, to check against."""
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            images = list(images)
        if not isinstance(images, (list, tuple)):
            images = [images]
        is_nested = any(item is None or isinstance(item, (list, tuple)) for item in images)
        is_preprocessed = kwargs.get("do_rescale", (kwargs.get("images_kwargs") or {}).get("do_rescale")) is False

        def load(source: Any) -> Any:
            if not is_preprocessed or not isinstance(source, (np.ndarray, torch.Tensor)):
                return load_image(source)
            height, width, _ = check_array(source).shape
            if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
                raise ValueError(f"{width}x{height} is longer than {MAX_ASPECT_RATIO} times its width: crop it first")
            return source

        return load_batch(images, is_nested, placeholders, "image", load)

    def _load_videos(self, videos: Any, placeholders: list[int] | None, kwargs: dict) -> list[list]:
        """The frames of all videos; `placeholders` are the counts per sample, to check against."""
        options = {**(kwargs.get("videos_kwargs") or {}), **kwargs}
        if options.get("fps") is not None:
            raise ValueError("fps: one frame of each second is taken; choose how many at most by num_frames.")
        num_frames = options.get("num_frames")
        if num_frames is not None and (isinstance(num_frames, bool) or not isinstance(num_frames, Integral) or num_frames < 1):
            raise ValueError(f"num_frames={num_frames!r}: expected a positive integer.")
        if is_video(videos) or not isinstance(videos, (list, tuple)):
            videos = [videos]
        is_nested = any(isinstance(item, (list, tuple)) and not is_video(item) for item in videos)
        most = MAX_NUM_FRAMES if num_frames is None else int(num_frames)
        return load_batch(videos, is_nested, placeholders, "video", lambda source: load_video(source, most))

    def _in_order(self, text: list[str] | None, images: list, videos: list[list]) -> list:
        """Images and frames in the order of the prompts."""
        if text is None:
            return [*images, *(frame for frames in videos for frame in frames)]
        next_image, next_video, ordered = iter(images), iter(videos), []
        for found in re.findall(f"{re.escape(self.image_token)}|{VIDEO_PLACEHOLDER}", "\n".join(text)):
            ordered += next(next_video) if found == VIDEO_PLACEHOLDER else [next(next_image)]
        return ordered


# ── What is checked before transformers takes it ─────────────────────────────────────────────────────────────────────


def _check_conversation(messages: Any) -> None:
    """Raise a ValueError that names the message or the content item which is not of the kind that transformers expects."""
    if hasattr(messages, "messages"):  # an object that transformers itself takes apart
        return
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"conversation: expected a list of messages, got {type(messages).__name__} {messages!r:.99}.")
    for number, message in enumerate(messages):
        place = f"Message {number} (counted from 0)"
        if not isinstance(message, dict):
            if hasattr(message, "role"):
                continue
            raise ValueError(f"{place}: expected a dict with role and content, got {message!r:.99}.")
        content = message.get("content")
        if not isinstance(content, (str, list, tuple)):
            raise ValueError(f"{place} has no content: expected a string or a list, got {content!r:.99}.")
        for item in content if not isinstance(content, str) else []:
            kind = item.get("type") if isinstance(item, dict) else None
            if not isinstance(kind, str):
                raise ValueError(f"{place}: expected content items with a type, got {item!r:.99}.")
            sources = [key for key in ("image", "video", "path", "url", "base64") if item.get(key) is not None]
            if kind in ("image", "video") and len(sources) > 1:
                given = " and ".join(sources)
                raise ValueError(f"{place}: expected one source of each {kind}, got several sources, {given}.")


def _check_image_processor(image_processor: Any) -> None:
    """Refuse the settings of a damaged file that would exhaust the memory, or make all images alike. Raises ValueError."""
    for name in ("size", "crop_size"):
        size = getattr(image_processor, name, None) or {}
        sides = size.values() if isinstance(size, dict) else vars(size).values()
        if any(isinstance(side, int) and not 0 < side <= MAX_IMAGE_SIDE for side in sides):
            raise ValueError(f"image_processor.{name}={size}: expected sides from 1 to {MAX_IMAGE_SIDE} pixels.")
    factor = getattr(image_processor, "rescale_factor", None)
    std = getattr(image_processor, "image_std", None)
    for name, values in (("rescale_factor", factor), ("image_std", std)):
        values = [] if values is None else values if isinstance(values, (list, tuple)) else [values]
        if not all(isinstance(value, (int, float)) and math.isfinite(value) and value > 0 for value in values):
            raise ValueError(f"image_processor.{name}={getattr(image_processor, name)}: expected positive numbers.")


__all__ = ["MiniMindVProcessor"]
