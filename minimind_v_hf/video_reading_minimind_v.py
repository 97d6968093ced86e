"""Videos: the frames of one that the model is shown, as images.

One frame a second; of a long video as many as are allowed, at the middle of equal parts of it. PyAV decodes, and seeks where
the next frame is far, so that an hour of video takes hardly longer than a few minutes of it.

This file is copied into every saved model folder. It depends on torch, numpy and Pillow alone until a video is read.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from .image_reading_minimind_v import find_file, load_image


MAX_NUM_FRAMES = 64
"""Frames of one video at most: each takes as many tokens of the prompt as an image."""

_MAX_VIDEO_DOWNLOAD = 512 * 2**20  # bytes

MAX_FRAME_PIXELS = 7680 * 4320
"""Larger frames are refused before they are decoded."""

_ENOUGH_PIXELS = 512  # on the shorter side: larger frames are shrunk at once, by a whole number, so that many fit into memory

# Without playlists, which could make the decoder open other files and addresses, without single images, and without raw
# streams, which have no times
_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,apng"


def sample_uniformly(count: int, maximum: int) -> list[int]:
    """Indices of at most `maximum` of `count` things: at the middle of that many equal parts, or all of them."""
    if count <= maximum:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * maximum) for i in range(maximum)]  # ⌊i·g + g/2⌋ with g = count / maximum


def load_video(source: Any, max_frames: int = MAX_NUM_FRAMES) -> list[Image.Image]:
    """The frames of a video that the model is shown: see `read_video`.

    Args:
        source: a path, a URL, base64 data, the bytes of a file, or frames: a list of images or an array (frames, H, W, 3). Of
            frames, all are taken, or `max_frames` of them at the middle of equal parts.
        max_frames: frames at most.

    Raises:
        ValueError: the video cannot be read, with the reason.
        ImportError: PyAV is not installed.
    """
    if isinstance(source, (str, os.PathLike, bytes)):
        return read_video(find_file(source, _MAX_VIDEO_DOWNLOAD), max_frames)
    if not isinstance(source, (list, tuple, np.ndarray, torch.Tensor)) or len(source) == 0:
        raise ValueError(f"expected a path, a URL or a list of frames, got {type(source).__name__}")
    if isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim != 4:
        raise ValueError(f"expected frames as an array of shape (frames, H, W, 3), got {tuple(source.shape)}")
    return [load_image(source[index]) for index in sample_uniformly(len(source), max_frames)]


def is_video(item: Any) -> bool:
    """Whether this is one video: a file of it, an array of frames or a list of images, rather than a list of videos."""
    if isinstance(item, (list, tuple)):
        return bool(item) and all(
            isinstance(frame, Image.Image) or (isinstance(frame, (np.ndarray, torch.Tensor)) and frame.ndim < 4)
            for frame in item
        )
    return isinstance(item, (str, os.PathLike, bytes)) or (isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 4)


def read_video(file: str | os.PathLike | BinaryIO, max_frames: int = MAX_NUM_FRAMES) -> list[Image.Image]:
    """The first frame, then the first one of each further second, and of these at most `max_frames`.

    Frames are turned upright where the file says so. Their times count, not their numbers, so that a recording with an
    uneven rate is sampled evenly.

    Args:
        file: path, or a file opened for reading bytes.
        max_frames: frames at most.

    Raises:
        ValueError: the file is no video, or is damaged, with the reason.
        ImportError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("Reading a video needs PyAV: pip install av") from error
    try:
        # Titles may be in any encoding
        with av.open(file, options={"format_whitelist": _FORMATS}, metadata_errors="replace") as container:
            if not container.streams.video:
                raise ValueError("the file holds no video")
            stream: Any = container.streams.video[0]
            if stream.width * stream.height > MAX_FRAME_PIXELS:
                raise ValueError(f"frames of {stream.width}x{stream.height} exceed the limit of {MAX_FRAME_PIXELS} pixels")
            stream.thread_type = "AUTO"
            times, keyframes = _scan(container, stream)
            if container.format.name == "mpeg":
                keyframes = []  # no seeking: the frames behind would have their neighbours' times
            seconds = _first_of_each_second([float((time - times[0]) * stream.time_base) for time in times])
            wanted = [times[seconds[i]] for i in sample_uniformly(len(seconds), max_frames)]
            return _decode(container, stream, wanted, keyframes)
    except OSError as error:  # of the system: no such file, no permission
        raise ValueError(error.strerror or str(error)) from error
    except av.error.FFmpegError as error:
        raise ValueError(f"the file is not a video in a known format, or is damaged ({error.strerror})") from error


def _scan(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """The times of all frames and of the keyframes, ascending, in the stream's unit. Nothing is decoded.

    Raises:
        ValueError: there are none, or they end well before the length in the file's header.
    """
    times, keyframes, end = [], [], 0.0
    for packet in container.demux():
        time = packet.dts if packet.pts is None else packet.pts
        if time is None or packet.is_discard:
            continue
        end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index == stream.index:
            times.append(time)
            if packet.is_keyframe:
                keyframes.append(time)
    if not times:
        raise ValueError("the file holds a video without frames")
    # The length of other formats is a guess of FFmpeg's
    if {"mp4", "matroska"} & set(container.format.name.split(",")) and container.duration is not None:
        length = container.duration / 1e6
        if length - end > 1:
            raise ValueError(f"the file is cut off: it should last {length:.1f} s, but ends after {end:.1f} s")
    return sorted(times), sorted(keyframes)


def _first_of_each_second(seconds: list[float]) -> list[int]:
    """Indices of the first frame in each second that has one, of frames at these ascending times."""
    chosen, current = [], -1
    for index, second in enumerate(seconds):
        if int(second + 1e-6) > current:
            current = int(second + 1e-6)
            chosen.append(index)
    return chosen


def _decode(container: Any, stream: Any, wanted: list[int], keyframes: list[int]) -> list[Image.Image]:
    """The frames of these times, as upright images of a moderate size."""
    images: list[Image.Image] = []
    position = None  # of the frame decoded last
    frames: Any = iter(())
    for time in wanted:
        earlier = keyframes[: bisect_right(keyframes, time)]
        if position is None or (earlier and earlier[-1] > position):
            frames = _frames_from_before(time, container, stream, earlier)
        for frame in frames:
            position = _time(frame)
            if position is None or position >= time:
                images.append(_to_image(frame))
                break
        else:
            second = float(time * stream.time_base)
            raise ValueError(f"the file is damaged: its frame at {second:.1f} s cannot be decoded")
    return images


def _frames_from_before(time: int, container: Any, stream: Any, earlier: list[int]) -> Iterator[Any]:
    """The frames from the last of the keyframes before a time on, or from one before that.

    FFmpeg may land behind the keyframe that it is told to seek, in MPEG streams above all, which have no index.
    """
    back = 0
    while True:
        if back < len(earlier):
            container.seek(earlier[-1 - back], stream=stream)
        else:
            container.seek(0)
        frames = container.decode(stream)
        first = next(frames, None)
        if back >= len(earlier) or (first is not None and (_time(first) or 0) <= time):
            return chain(() if first is None else (first,), frames)
        back = 2 * back + 1


def _time(frame: Any) -> int | None:
    return frame.dts if frame.pts is None else frame.pts


def _to_image(frame: Any) -> Image.Image:
    image = frame.to_image()
    factor = min(image.size) // _ENOUGH_PIXELS
    if factor > 1:
        image = image.reduce(factor)
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
