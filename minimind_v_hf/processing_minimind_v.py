"""MiniMindVProcessor: pictures and chat messages in, `input_ids` and `pixel_values` out.

Three things happen here that an image processor and a tokenizer do not do by themselves:

* Pictures of every kind (paths, URLs, arrays; palette, CMYK, 16-bit, rotated) become RGB as a person sees them, and videos
  become pictures: see video_minimind_v.py.
* `<image>` in a prompt becomes one image token for each vector that the model makes of a picture; `<video>` becomes one such
  run for each frame.
* What a user types is text. The chat template puts a mark into anything in a message that looks like a control token,
  `<|im_start|>` say; the marked string is not recognised as one, and the tokenizer's normalizer takes the mark out again.

This file is copied into every saved model folder, so it depends on torch and transformers alone; videos need PyAV.
"""

import base64
import binascii
import copy
import http.client
import io
import json
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from packaging import version
from PIL import Image, ImageOps
from tokenizers import Tokenizer, normalizers
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TextInput
from transformers.utils import logging
from transformers.video_utils import VideoInput

from .configuration_minimind_v import MiniMindVConfig
from .video_minimind_v import MAX_NUM_FRAMES, read_video, sample_uniformly


logger = logging.get_logger(__name__)

IMAGE_PLACEHOLDER = "<image>"
"""Where a picture belongs in a prompt or a data set, whatever the tokenizer's own image token is."""

VIDEO_PLACEHOLDER = "<video>"
"""Where a video belongs in a prompt."""

CONTROL_MARK = "\ufdd0"
"""A Unicode noncharacter, which is reserved for use inside a program: it stands in no text."""

MAX_IMAGE_PIXELS = 89_478_485
"""Larger files are refused before they are decoded: a quarter of a gigabyte as RGB, Pillow's own warning threshold."""

_DOWNLOAD_TIMEOUT = 30  # seconds
_MAX_DOWNLOAD = 64 * 2**20  # bytes
_MAX_VIDEO_DOWNLOAD = 512 * 2**20


# ── The chat template ────────────────────────────────────────────────────────────────────────────────────────────────

_CHAT_TEMPLATE = """\
{#- Text from a message: control tokens begin with "<", so each gets a mark, which the tokenizer's normalizer removes. -#}
{%- macro plain(text) -%}
    {{- text | replace("<", "<" ~ mark) -}}
{%- endmacro -%}
{#- A string may hold <image>. In a list, pictures and videos are items of their own, and <image> in a text item is text. -#}
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- plain(content) | replace("<" ~ mark ~ "image>", picture) -}}
    {%- elif content -%}
        {#- vLLM takes a template for one of lists when it finds a loop over just this name. -#}
        {%- for item in content -%}
            {%- if item.type == "image" -%}
                {{- picture -}}
            {%- elif item.type == "video" -%}
                {{- "<video>" -}}
            {%- elif item.type == "text" -%}
                {{- plain(item.text) -}}
            {%- else -%}
                {{- raise_exception("Unknown content type '" ~ item.type ~ "': expected 'image', 'video' or 'text'.") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if default_system and messages[0].role != "system" -%}
    {{- "<|im_start|>system\\n" ~ default_system ~ "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in ["system", "user", "assistant"] -%}
        {{- raise_exception("Unknown role '" ~ message.role ~ "': expected 'system', 'user' or 'assistant'.") -}}
    {%- endif -%}
    {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
    {%- if message.role == "assistant" -%}
        {%- set content = render(message.content) -%}
        {%- set said = namespace(content=content) -%}
        {%- generation -%}
            {%- if thinking -%}
                {#- The assistant's own thoughts and calls are control tokens that it learned -#}
                {%- for name in ["think>", "/think>", "tool_call>", "/tool_call>"] -%}
                    {%- set said.content = said.content | replace("<" ~ mark ~ name, "<" ~ name) -%}
                {%- endfor -%}
                {%- set content = said.content -%}
                {%- set reasoning = "" -%}
                {%- if message.reasoning_content is string -%}
                    {%- set reasoning = plain(message.reasoning_content) -%}
                {%- elif "</think>" in content -%}
                    {%- set reasoning = content.split("</think>")[0].split("<think>")[-1] -%}
                    {%- set content = content.split("</think>")[-1] -%}
                {%- endif -%}
                {%- set reasoning = reasoning.strip("\\n") -%}
                {%- if reasoning or not (drop_empty_thinking is defined and drop_empty_thinking) -%}
                    {{- "<think>\\n" ~ reasoning ~ "\\n</think>\\n\\n" -}}
                {%- endif -%}
                {%- set content = content.lstrip("\\n") -%}
            {%- endif -%}
            {{- content ~ "<|im_end|>\\n" -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- render(message.content) ~ "<|im_end|>\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
    {%- if thinking -%}
        {{- "<think>\\n" if open_thinking is defined and open_thinking else "<think>\\n\\n</think>\\n\\n" -}}
    {%- endif -%}
{%- endif -%}
"""


def build_chat_template(image_token: str, default_system: str | None, thinking: bool) -> str:
    """The ChatML template of MiniMind-V, in Jinja, with `{% generation %}` around what a model learns to say.

    Args:
        image_token: written where a picture belongs.
        default_system: system message of conversations that have none (MiniMind2), or None.
        thinking: open each answer with a `<think>` block (minimind-3); the option `open_thinking` of
            `apply_chat_template` then leaves it open in the prompt, and `drop_empty_thinking` omits blocks without thoughts.
    """
    settings = {"picture": image_token, "mark": CONTROL_MARK, "default_system": default_system or "", "thinking": thinking}
    header = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in settings.items())
    return header + _CHAT_TEMPLATE


# ── The tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that has an image token and takes out control marks: the given one if it does so, else a copy.

    MiniMind2's tokenizer has no image token, and a new id would grow the embedding. But its vocabulary, like every
    byte-level one, holds the byte 0xFF, which no valid UTF-8 contains: that entry (id 190) is renamed to `<image>`. Every
    other id stays as it is. minimind-3's tokenizer has `<|image_pad|>` and keeps it. A tokenizer without such a byte
    gets a new id, for which the model's embedding must be resized.

    Raises:
        ValueError: the tokenizer has no `tokenizers` backend.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer. MiniMindVProcessor needs one, with a tokenizer.json."
        )
    image_token = _find_image_token(tokenizer)
    named = image_token is not None and getattr(tokenizer, "image_token", None) == image_token
    normalizer = tokenizer.backend_tokenizer.normalizer
    if named and normalizer is not None and normalizer.normalize_str(CONTROL_MARK) == "":
        return tokenizer

    if named:
        tokenizer = copy.deepcopy(tokenizer)
    else:
        state = tokenizer.backend_tokenizer.to_str() if image_token else _with_image_token(tokenizer)
        special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(state),
            model_max_length=tokenizer.model_max_length,
            clean_up_tokenization_spaces=False,
            extra_special_tokens={"image_token": image_token or IMAGE_PLACEHOLDER},
            **{name: token for name, token in special.items() if token is not None},
        )
    remove_marks = normalizers.Replace(CONTROL_MARK, "")
    tokenizer.backend_tokenizer.normalizer = (
        remove_marks if normalizer is None else normalizers.Sequence([remove_marks, normalizer])
    )
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # what batched generation needs
    return tokenizer


def _find_image_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    added = tokenizer.get_added_vocab()
    candidates = [getattr(tokenizer, "image_token", None), IMAGE_PLACEHOLDER, "<|image_pad|>"]
    return next((token for token in candidates if token in added), None)


def _with_image_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer.json with `<image>`: in place of a byte that never occurs, or else as a new id."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"].get("vocab")
    # Byte-level BPE writes the bytes from 0xAE on as the character of the same number
    unreachable = [chr(byte) for byte in (*range(0xFF, 0xF4, -1), 0xC1, 0xC0)]
    if "ByteLevel" not in json.dumps(state["pre_tokenizer"]) or not isinstance(vocab, dict):
        unreachable = []
    merges = (merge if isinstance(merge, list) else merge.split(" ") for merge in state["model"].get("merges", []))
    merged = {part for merge in merges for part in merge}
    symbol = next((symbol for symbol in unreachable if symbol in vocab and symbol not in merged), None)
    if symbol is not None:
        token_id = vocab[IMAGE_PLACEHOLDER] = vocab.pop(symbol)
    else:
        token_id = len(tokenizer)
        logger.warning(
            f"This tokenizer has no image token and no unused entry: {IMAGE_PLACEHOLDER} becomes the new id {token_id}. "
            f"Call model.resize_token_embeddings({token_id + 1})."
        )
    image_token = {"id": token_id, "content": IMAGE_PLACEHOLDER, "special": True}
    image_token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"] = sorted([*state["added_tokens"], image_token], key=lambda token: token["id"])
    return json.dumps(state)


# ── Pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_image(source: Any, min_size: int | None = None) -> Image.Image:
    """A picture as a person sees it: RGB, upright, transparency over white.

    Args:
        source: a PIL image, an array or tensor ((H, W), (H, W, C) or (C, H, W); bytes, 16-bit integers, or floats from 0
            to 1), a path, a URL, base64 data, or the bytes of a file.
        min_size: the size, in pixels, to which the caller will shrink the picture. A JPEG may then be decoded at 1/2, 1/4
            or 1/8 of its size, down to twice `min_size`: three times as fast for a photograph of a megapixel, whose
            shrunk pixels differ by 0.3 of 255 on average.

    Raises:
        ValueError: the picture cannot be read, with the reason.
    """
    if isinstance(source, (str, os.PathLike, bytes)):
        source = _open(source)
        if min_size is not None:
            source.draft(None, (2 * min_size, 2 * min_size))
    elif isinstance(source, (np.ndarray, torch.Tensor)):
        source = _from_array(source)
    elif not isinstance(source, Image.Image):
        raise ValueError(f"expected a PIL image, an array, a path or a URL, got {type(source).__name__}")
    try:
        return _to_rgb(ImageOps.exif_transpose(source))
    except Exception as error:  # each decoder has its own ways to fail on damaged bytes
        raise ValueError(f"the file is truncated or damaged ({error})") from error


def _open(source: str | os.PathLike | bytes) -> Image.Image:
    """Open a path, URL, base64 string or a file's bytes without decoding its pixels yet."""
    file: Any = source
    name = os.fspath(source)
    try:
        if isinstance(name, bytes):
            file = io.BytesIO(name)
        elif name.lower().startswith(("http://", "https://")):
            file = _download(name, _MAX_DOWNLOAD)
        elif not os.path.isfile(name):
            file = io.BytesIO(_decode_base64(name))
        image = Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise ValueError("the file is not a picture in a known format") from error
    except (OSError, http.client.HTTPException, Image.DecompressionBombError, RuntimeError, SyntaxError) as error:
        raise ValueError(str(error)) from error
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{image.width}x{image.height} pixels exceed the limit of {MAX_IMAGE_PIXELS} (a decompression bomb?); "
            "resize the file, or pass it as a PIL image if you trust it"
        )
    return image


def _download(url: str, max_bytes: int) -> io.BytesIO:
    url = urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~")  # as a browser does with 图.png
    request = urllib.request.Request(url, headers={"User-Agent": "minimind_v_hf"})
    with urllib.request.urlopen(request, timeout=_DOWNLOAD_TIMEOUT) as response:
        file = io.BytesIO(response.read(max_bytes + 1))
    if file.getbuffer().nbytes > max_bytes:
        raise ValueError(f"the download exceeds {max_bytes >> 20} MiB")
    return file


def _decode_base64(text: str) -> bytes:
    encoded = text.partition("base64,")[2] if text.startswith("data:") else text
    try:
        # A file name is hardly ever valid base64 of this length
        if len(encoded) < 64:
            raise ValueError
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        shown = text if len(text) <= 200 else text[:200] + "…"
        raise ValueError(f"there is no such file, and it is no URL and no base64 data: {shown!r}") from None


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    channels_first = isinstance(array, torch.Tensor)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # numpy has no bfloat16
    values = array
    if values.ndim == 2:
        values = values[..., None]
    counts = (1, 3, 4)
    if values.ndim != 3 or not (values.shape[0] in counts or values.shape[-1] in counts) or values.size == 0:
        raise ValueError(f"expected an array of shape (H, W), (H, W, C) or (C, H, W), got {tuple(values.shape)}")
    if values.shape[-1] not in counts or (channels_first and values.shape[0] in counts):
        values = values.transpose(1, 2, 0)
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all():
            raise ValueError("the array holds NaN or infinite values")
        values = values * 255 if values.max() <= 1 else values
    elif values.dtype == np.bool_:
        values = values * 255.0
    elif values.dtype == np.uint16:
        values = values / 257
    if values.min() < 0 or values.max() > 255:
        raise ValueError(f"expected values from 0 to 255, or floats from 0 to 1; got {values.min()} to {values.max()}")
    values = values.round().astype(np.uint8)
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
        values = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I;16") or values.max() > 255:
            scale = 255 / 65535
        else:  # 32 bits without a word on their range
            scale = 255 if 0 < values.max() <= 1 and image.mode == "F" else 1
        image = Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def load_video(source: Any, max_frames: int = MAX_NUM_FRAMES) -> list[Image.Image]:
    """The frames of a video that the model is shown: see `video_minimind_v.read_video`.

    Args:
        source: a path, a URL, the bytes of a file, or frames: a list of pictures or an array (frames, H, W, 3). Of frames, all
            are taken, or `max_frames` of them at the middle of equal parts.
        max_frames: frames at most.

    Raises:
        ValueError: the video cannot be read, with the reason.
        ImportError: PyAV is not installed.
    """
    if isinstance(source, (str, os.PathLike, bytes)):
        name = os.fspath(source)
        file: Any = name
        if isinstance(name, bytes):
            file = io.BytesIO(name)
        elif name.lower().startswith(("http://", "https://")):
            try:
                file = _download(name, _MAX_VIDEO_DOWNLOAD)
            except OSError as error:
                raise ValueError(str(error)) from error
        elif not os.path.isfile(name):
            raise ValueError("there is no such file, and it is no URL")
        return read_video(file, max_frames)
    if not isinstance(source, (list, tuple, np.ndarray, torch.Tensor)) or len(source) == 0:
        raise ValueError(f"expected a path, a URL or a list of frames, got {type(source).__name__}")
    return [load_image(source[index]) for index in sample_uniformly(len(source), max_frames)]


def _is_video(item: Any) -> bool:
    """Whether this is one video: a file of it, an array of frames or a list of pictures, rather than a list of videos."""
    if isinstance(item, (list, tuple)):
        return bool(item) and all(
            isinstance(frame, Image.Image) or (isinstance(frame, (np.ndarray, torch.Tensor)) and frame.ndim < 4)
            for frame in item
        )
    return isinstance(item, (str, os.PathLike, bytes)) or (isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 4)


def _unreadable(kind: str, sample: int, index: int, source: Any, reason: Exception, is_only: bool) -> ValueError:
    """Says which picture or video cannot be read, and why."""
    name = f" ({os.fspath(source)[:200]})" if isinstance(source, (str, os.PathLike)) else ""
    if is_only:
        return ValueError(f"Cannot read the {kind}{name}: {reason}.")
    return ValueError(f"Cannot read {kind} {index} of sample {sample}{name}: {reason}. (Both counted from 0.)")


# ── The processor ────────────────────────────────────────────────────────────────────────────────────────────────────


class MiniMindVProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """The keyword arguments of `MiniMindVProcessor.__call__`."""

    _defaults = {
        "text_kwargs": {"padding": False, "return_mm_token_type_ids": False, "return_text_replacement_offsets": False},
    }


class MiniMindVProcessor(ProcessorMixin):
    r"""Image processor and tokenizer in one, and the chat template that joins them.

    Args:
        image_processor: any image processor of transformers that gives `pixel_values` of the encoder's size.
        tokenizer: a fast tokenizer. One without an image token is copied and given one: see `prepare_tokenizer`.
        chat_template: a Jinja template. By default ours, in the manner of the tokenizer's generation: with a
            `<think>` block when its vocabulary knows `<think>`, else with MiniMind2's default system message.
        image_seq_length: image tokens per picture, `config.image_seq_length` of the model; by default that of
            MiniMind2-V, 196.
    """

    valid_processor_kwargs = MiniMindVProcessorKwargs
    _auto_class = "AutoProcessor"
    video_token = VIDEO_PLACEHOLDER  # which becomes runs of image tokens, so it has no id
    video_processor = None  # to transformers this says that videos are understood: their frames go to the image processor

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, image_seq_length=None, **kwargs):
        if image_seq_length is None:
            image_seq_length = MiniMindVConfig().image_seq_length
        if not isinstance(image_seq_length, int) or image_seq_length < 1:
            raise ValueError(f"image_seq_length={image_seq_length!r}: expected a positive integer.")
        prepared = prepare_tokenizer(tokenizer)
        self.image_seq_length = image_seq_length
        self.image_token = prepared.image_token
        self.image_token_id = prepared.convert_tokens_to_ids(self.image_token)
        if chat_template is None:
            thinking = "<think>" in prepared.get_added_vocab()
            default_system = None if thinking else "You are a helpful assistant"
            chat_template = build_chat_template(self.image_token, default_system, thinking)
        if prepared is not tokenizer:
            prepared.chat_template = chat_template  # for those who use the tokenizer alone
        super().__init__(image_processor, prepared, chat_template=chat_template)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        videos: VideoInput | None = None,
        audio: None = None,
        **kwargs: Unpack[MiniMindVProcessorKwargs],
    ) -> BatchFeature:
        """Prepare prompts, their pictures and their videos for the model.

        Args:
            images: a picture, a list of them in the order of their placeholders, or a list per sample. See `load_image`.
            text: a prompt with one `<image>` per picture and one `<video>` per video, or a list of prompts.
            videos: a video, a list of them, or a list per sample; a frame of each second becomes a picture. See `load_video`.
            kwargs: of the tokenizer (`padding=True`, …), of the image processor, `num_frames` (of a video at most), and
                `return_tensors`.

        Returns:
            `input_ids` and `attention_mask` (batch, tokens), and `pixel_values` (images in the whole batch, 3, height, width).

        Raises:
            ValueError: a picture or a video cannot be read, or they and their placeholders do not match in number.
            ImportError: a video is given, and PyAV is not installed.
        """
        outputs = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if "offset_mapping" in outputs and version.parse(transformers_version) < version.parse("5.18"):
            if videos is not None:
                raise ValueError("Offsets (and so the assistant mask) of a prompt with a video need transformers 5.18.")
            # Before 5.18, `apply_chat_template(return_assistant_tokens_mask=True)` looks for offsets in the prompt as it
            # was before `<image>` became many tokens
            offsets = zip(outputs["input_ids"], outputs["offset_mapping"], strict=True)
            outputs["offset_mapping"] = [self._offsets_before_expansion(*sample) for sample in offsets]
        return outputs

    def _offsets_before_expansion(self, input_ids, offsets) -> list[tuple[int, int]]:
        """Offsets in the unexpanded prompt: the tokens of one image all stand where its placeholder does."""
        moved, image_tokens, end_of_text = [], 0, 0
        for token_id, (start, end) in zip(input_ids, offsets, strict=True):
            complete_images = image_tokens // self.image_seq_length
            gained = (image_tokens - complete_images) * len(self.image_token)
            image_tokens += int(token_id) == self.image_token_id
            is_padding = start == end and end_of_text > 0
            moved.append((end_of_text, end_of_text) if is_padding else (int(start) - gained, int(end) - gained))
            end_of_text = max(end_of_text, moved[-1][1])
        return moved

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Load the pictures and videos, put all in the order of their placeholders, and check that the counts match.

        Returns:
            images (the pictures, and the frames of the videos), text, videos (each a list of its frames), audio.

        Raises:
            ValueError: a picture or video cannot be read, or a sample has more or fewer of them than placeholders. The
                message names it and the sample, both counted from 0.
        """
        if isinstance(text, str):
            text = [text]
        if text is not None:
            if not isinstance(text, (list, tuple)) or not all(isinstance(sample, str) for sample in text):
                raise ValueError("text: expected a string or a list of strings.")
            text = [sample.replace(IMAGE_PLACEHOLDER, self.image_token) for sample in text]
        if images is not None:
            images = self._load_images(images, self._count(text, self.image_token), kwargs) or None
        else:
            self._refuse_placeholders(text, self.image_token, "image")
        if videos is not None:
            videos = self._load_videos(videos, self._count(text, VIDEO_PLACEHOLDER), kwargs)
            images = self._in_order(text, images or [], videos)
        elif images is None:
            self._refuse_placeholders(text, VIDEO_PLACEHOLDER, "video")
        elif any(self._count(text, VIDEO_PLACEHOLDER) or []):  # transformers' processors let it pass beside images
            logger.warning("There are <video> placeholders, but no videos were passed: they stay text.")
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    @staticmethod
    def _count(text: list[str] | None, placeholder: str) -> list[int] | None:
        return None if text is None else [sample.count(placeholder) for sample in text]

    def _refuse_placeholders(self, text: list[str] | None, placeholder: str, kind: str) -> None:
        for sample, count in enumerate(self._count(text, placeholder) or []):
            if count:
                raise ValueError(
                    f"Sample {sample} (counted from 0) has {count} <{kind}> placeholders, but no {kind}s were passed."
                )

    def _in_order(self, text: list[str] | None, images: list, videos: list[list]) -> list:
        """Pictures and frames as the model meets them."""
        if text is None:
            return [*images, *(frame for frames in videos for frame in frames)]
        next_image, next_video, ordered = iter(images), iter(videos), []
        for found in re.findall(f"{re.escape(self.image_token)}|{VIDEO_PLACEHOLDER}", "\n".join(text)):
            ordered += next(next_video) if found == VIDEO_PLACEHOLDER else [next(next_image)]
        return ordered

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Check what `prepare_inputs_layout` has not: it counted the pictures."""
        text = None if images is not None else text
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _process_videos(self, videos: list[list], **kwargs) -> tuple[dict, list[str]]:
        """What stands in the prompt for each video; its frames are among the pictures already."""
        return {}, [self.replace_image_token({}, 0) * len(frames) for frames in videos]

    def _load_videos(self, videos: Any, placeholders: list[int] | None, kwargs: dict) -> list[list]:
        """The frames of all videos; `placeholders` are the counts per sample, to check against."""
        options = {**(kwargs.get("videos_kwargs") or {}), **kwargs}
        if options.get("fps") is not None:
            raise ValueError("fps: one frame of each second is taken; choose how many at most by num_frames.")
        if _is_video(videos) or not isinstance(videos, (list, tuple)):
            videos = [videos]
        is_nested = any(isinstance(item, (list, tuple)) and not _is_video(item) for item in videos)
        samples = self._by_sample(videos, is_nested, placeholders, "video")
        loaded = []
        for sample, index, source in samples:
            try:
                loaded.append(load_video(source, options.get("num_frames") or MAX_NUM_FRAMES))
            except ValueError as error:
                raise _unreadable("video", sample, index, source, error, len(samples) == 1) from error
        return loaded

    def _load_images(self, images: Any, placeholders: list[int] | None, kwargs: dict) -> list:
        """All pictures in one list; `placeholders` are the counts per sample, to check against."""
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            images = list(images)
        if not isinstance(images, (list, tuple)):
            images = [images]
        is_nested = any(item is None or isinstance(item, (list, tuple)) for item in images)
        samples = self._by_sample(images, is_nested, placeholders, "image")
        # Unrescaled arrays are the caller's own preprocessing
        keep_arrays = kwargs.get("do_rescale", (kwargs.get("images_kwargs") or {}).get("do_rescale")) is False
        loaded: list[Any] = []
        for sample, index, source in samples:
            if keep_arrays and isinstance(source, (np.ndarray, torch.Tensor)):
                loaded.append(source)
                continue
            try:
                loaded.append(load_image(source))
            except ValueError as error:
                raise _unreadable("image", sample, index, source, error, len(samples) == 1) from error
        return loaded

    def _by_sample(
        self, items: Iterable, is_nested: bool, placeholders: list[int] | None, kind: str
    ) -> list[tuple[int, int, Any]]:
        """Pictures or videos, each with the number of its sample and its own number within that sample.

        Raises:
            ValueError: they do not match the placeholders in number.
        """
        items = list(items)
        if is_nested:
            samples = [list(item) if isinstance(item, (list, tuple)) else [] if item is None else [item] for item in items]
            if placeholders is not None:
                self._check_counts(placeholders, [len(sample) for sample in samples], kind)
        elif placeholders is None:
            samples = [items]
        else:
            if sum(placeholders) != len(items):
                if len(placeholders) == 1:
                    self._check_counts(placeholders, [len(items)], kind)
                raise ValueError(
                    f"The {len(placeholders)} samples have {placeholders} <{kind}> placeholders, {sum(placeholders)} in all, "
                    f"but {len(items)} {kind}s were passed. Pass one {kind} per placeholder, in a list per sample to have "
                    "each sample checked."
                )
            remaining = iter(items)
            samples = [[next(remaining) for _ in range(count)] for count in placeholders]
        return [(sample, index, item) for sample, some in enumerate(samples) for index, item in enumerate(some)]

    @staticmethod
    def _check_counts(placeholders: list[int], given: list[int], kind: str) -> None:
        if len(placeholders) != len(given):
            raise ValueError(
                f"The number of <{kind}> tokens in the prompts should be the same as the number of {kind}s in every "
                f"sample, but there are {len(placeholders)} texts, and {kind}s for {len(given)} samples."
            )
        for sample, (expected, count) in enumerate(zip(placeholders, given, strict=True)):
            if expected != count:
                raise ValueError(
                    f"Sample {sample} (counted from 0) has {expected} <{kind}> placeholders, but {count} {kind}s "
                    f"were passed for it. Pass one {kind} per placeholder."
                )

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write the processor, with its code and chat template, into a folder."""
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.__dict__.pop("auto_map", None)  # which saving leaves behind, so that a processor would differ from its copy
        return files

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What stands in the prompt for one picture."""
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: Iterable | None = None, **kwargs) -> MultiModalData:
        """Tokens and rows of pixels for pictures of these (height, width); for engines that plan ahead, such as vLLM."""
        if image_sizes is None:
            return MultiModalData()
        count = len(list(image_sizes))
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)


__all__ = ["MiniMindVProcessor"]
