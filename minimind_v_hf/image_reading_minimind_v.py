"""Images: files of every kind, URLs, base64 data and arrays become RGB as a person sees them, one or a batch of them.

This file is copied into every saved model folder. It depends on torch, numpy and Pillow alone.
"""

import base64
import binascii
import http.client
import io
import os
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps


MAX_IMAGE_PIXELS = 89_478_485
"""Larger files are refused before they are decoded: a quarter of a gigabyte as RGB, Pillow's own warning threshold."""

MAX_ASPECT_RATIO = 100
"""Of longer images the middle is kept. Scaled to the encoder's size by their shorter side, they would fill the memory."""

_DOWNLOAD_TIMEOUT = 30  # seconds without a byte
_DOWNLOAD_DEADLINE = 600  # seconds in all
_MAX_DOWNLOAD = 64 * 2**20  # bytes


def load_image(source: Any, min_size: int | None = None) -> Image.Image:
    """An image as a person sees it: RGB, upright, transparency over white, at most `MAX_ASPECT_RATIO` times as long as wide.

    Args:
        source: a PIL image, an array or tensor ((H, W), (H, W, C) or (C, H, W); bytes, 16-bit integers, or floats from 0
            to 1), a path, a URL, base64 data, or the bytes of a file.
        min_size: the size, in pixels, to which the caller will shrink the image. A JPEG may then be decoded at 1/2, 1/4
            or 1/8 of its size, down to twice `min_size`: three times as fast for a photograph of a megapixel, whose
            shrunk pixels differ by 0.3 of 255 on average.

    Raises:
        ValueError: the image cannot be read, with the reason.
    """
    if isinstance(source, (str, os.PathLike, bytes)):
        source = open_image(source)
        if min_size is not None:
            source.draft(None, (2 * min_size, 2 * min_size))
    elif isinstance(source, (np.ndarray, torch.Tensor)):
        source = _from_array(source)
    elif not isinstance(source, Image.Image):
        raise ValueError(f"expected a PIL image, an array, a path or a URL, got {type(source).__name__}")
    if not source.width or not source.height:
        raise ValueError(f"the image has no pixels: it is {source.width}x{source.height}")
    try:
        image = _to_rgb(ImageOps.exif_transpose(source))
    except Exception as error:  # decoders raise many kinds of errors on damaged bytes
        raise ValueError(f"the file is truncated or damaged ({error})") from error
    longest = MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) > longest:
        image = ImageOps.fit(image, (min(image.width, longest), min(image.height, longest)), Image.Resampling.NEAREST)
    return image


def load_batch(
    items: list[Any] | tuple[Any, ...],
    is_nested: bool,
    placeholders: list[int] | None,
    kind: str,
    load: Callable[[Any], Any],
) -> list[Any]:
    """The images or videos of a batch, in the order of their placeholders.

    Args:
        items: all of them one after another, or a list for each sample.
        is_nested: whether it is a list for each sample.
        placeholders: how many each sample's prompt has; None where there are no prompts.
        kind: "image" or "video", for the messages.
        load: reads one of them, and raises ValueError with the reason where it cannot.

    Raises:
        ValueError: they do not match the placeholders in number, or one cannot be read. The message names the sample.
    """
    samples = _by_sample(items, is_nested, placeholders, kind)
    is_only = sum(map(len, samples)) == 1
    loaded = []
    for number, sample in enumerate(samples):
        for index, source in enumerate(sample):
            try:
                loaded.append(load(source))
            except ValueError as error:
                name = f" ({os.fspath(source)[:200]})" if isinstance(source, (str, os.PathLike)) else ""
                if is_only:
                    raise ValueError(f"Cannot read the {kind}{name}: {error}.") from error
                raise ValueError(
                    f"Cannot read {kind} {index} of sample {number}{name}: {error}. (Both counted from 0.)"
                ) from error
    return loaded


def _by_sample(items: Any, is_nested: bool, placeholders: list[int] | None, kind: str) -> list[list[Any]]:
    """Images or videos, sample by sample; their number is checked."""
    if is_nested:
        samples = [list(item) if isinstance(item, (list, tuple)) else [] if item is None else [item] for item in items]
    elif placeholders is None or len(placeholders) == 1:
        samples = [list(items)]
    elif sum(placeholders) == len(items):
        remaining = iter(items)
        return [list(islice(remaining, count)) for count in placeholders]
    else:
        raise ValueError(
            f"The {len(placeholders)} samples have {placeholders} <{kind}> placeholders, {sum(placeholders)} in all, but "
            f"{len(items)} {kind}s were passed. Pass one {kind} per placeholder, in a list per sample to have each checked."
        )
    if placeholders is None:
        return samples
    if len(placeholders) != len(samples):
        raise ValueError(
            f"The number of <{kind}> tokens in the prompts should be the same as the number of {kind}s in every sample, but "
            f"there are {len(placeholders)} texts, and {kind}s for {len(samples)} samples."
        )
    for number, (expected, sample) in enumerate(zip(placeholders, samples, strict=True)):
        if expected != len(sample):
            raise ValueError(
                f"Sample {number} (counted from 0) has {expected} <{kind}> placeholders, but {len(sample)} {kind}s were "
                f"passed for it. Pass one {kind} per placeholder."
            )
    return samples


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """Open a path, URL, base64 string or a file's bytes without decoding its pixels yet.

    Raises:
        ValueError: it is no image, or too large.
    """
    try:
        image = Image.open(find_file(source, _MAX_DOWNLOAD))
    except Image.UnidentifiedImageError as error:
        raise ValueError("the file is not an image in a known format") from error
    except Exception as error:  # decoders raise many kinds of errors on damaged bytes
        raise ValueError(str(error) or type(error).__name__) from error
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{image.width}x{image.height} pixels exceed the limit of {MAX_IMAGE_PIXELS} (a decompression bomb?); "
            "resize the file, or pass it as a PIL image if you trust it"
        )
    return image


def find_file(source: str | os.PathLike | bytes, max_bytes: int) -> Any:
    """The name of a file, or the bytes that a URL, base64 data or the source itself stands for, as decoders open them.

    Args:
        source: a path, a URL, base64 data, or the bytes of a file.
        max_bytes: of a download.

    Raises:
        ValueError: there is no such file, or it cannot be downloaded.
    """
    name = os.fspath(source)
    if isinstance(name, bytes):
        return io.BytesIO(name)
    if name.lower().startswith(("http://", "https://")):
        return _download(name, max_bytes)
    if os.path.isfile(name):
        return name
    if os.path.exists(name):  # a folder, or a pipe, which would be waited for
        raise ValueError("it is not a regular file")
    return io.BytesIO(_decode_base64(name))


def _download(url: str, max_bytes: int) -> io.BytesIO:
    """The bytes behind a URL, `max_bytes` at most. Raises ValueError with the reason."""
    url = urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~")  # as a browser does with 图.png
    request = urllib.request.Request(url, headers={"User-Agent": "minimind_v_hf"})
    content, deadline = bytearray(), time.monotonic() + _DOWNLOAD_DEADLINE
    try:
        with urllib.request.urlopen(request, timeout=_DOWNLOAD_TIMEOUT) as response:
            while part := response.read1(2**20):
                content += part
                if len(content) > max_bytes:
                    raise ValueError(f"the download exceeds {max_bytes >> 20} MiB")
                if time.monotonic() > deadline:
                    raise ValueError(f"the download takes longer than {_DOWNLOAD_DEADLINE} seconds")
            if response.length:
                raise ValueError(f"the download breaks off: {response.length} bytes are missing")
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return io.BytesIO(content)


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


def check_array(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """An image's values, (H, W, C), whichever order they came in.

    Raises:
        ValueError: the shape is no image's, the values are complex, NaN or infinite.
    """
    channels_first = isinstance(array, torch.Tensor)
    if isinstance(array, torch.Tensor):
        if array.is_meta:
            raise ValueError("expected a tensor with data, got one on the meta device")
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # numpy has no bfloat16
    values = array[..., None] if array.ndim == 2 else array
    counts = (1, 3, 4)
    if values.ndim != 3 or not (values.shape[0] in counts or values.shape[-1] in counts) or values.size == 0:
        raise ValueError(f"expected an array of shape (H, W), (H, W, C) or (C, H, W), got {tuple(values.shape)}")
    if values.dtype.kind not in "fiub":
        raise ValueError(f"expected an array of integers, floats or booleans, got {values.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("the array holds NaN or infinite values")
    if values.shape[-1] not in counts or (channels_first and values.shape[0] in counts):
        values = values.transpose(1, 2, 0)
    return values


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    values = check_array(array)
    if values.dtype.kind == "f":
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
        if not np.isfinite(values).all():
            raise ValueError("the image holds NaN or infinite values")
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
