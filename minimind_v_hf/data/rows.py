"""One row of a data file: finds the files, reads the rows, and understands each in any of MiniMind-V's formats.

A row that is understood has strings as contents and one `<image>` per picture, whatever it had before.
"""

import glob
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..configuration_minimind_v import CONTROL_MARK, IMAGE_PLACEHOLDER
from .images import ImageStore


ROLES = ("system", "user", "assistant")


class RowError(ValueError):
    """A row that cannot be understood. `kind` is "json", "format", "role" or "path"."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass
class Row:
    """A conversation as training wants it: contents are strings, with one `<image>` per picture.

    Args:
        conversations: `{"role", "content"}` of each message.
        images: paths, `zip://` references or encoded bytes, in the order of their placeholders.
        removed_placeholders: how many `<image>` had no picture.
        added_placeholders: how many pictures had no `<image>`.
        stand_ins: how many black pictures stood in for none.
    """

    conversations: list[dict[str, str]]
    images: list[str] | list[bytes]
    removed_placeholders: int = 0
    added_placeholders: int = 0
    stand_ins: int = 0


REPAIRS = {
    "removed_placeholders": f"{IMAGE_PLACEHOLDER} without an image: the last ones were removed",
    "added_placeholders": f"images without {IMAGE_PLACEHOLDER}: put at the front",
    "stand_ins": "text rows with a black picture of 8x8: it was left out",
}


def parse_row(row: Any, store: ImageStore | None) -> Row:
    """Understand a row in any of the formats, and make its placeholders match its images.

    Args:
        row: has `conversations` or `messages` (a list, or a JSON string of it), and may have `image`, `images` or
            `image_bytes`: names, separated by commas or in a list, or encoded bytes.
        store: what names of images are relative to.

    Raises:
        RowError: the row is of another form, or an image's name leads out of the folder.
    """
    if not isinstance(row, dict):
        raise RowError("format", f"expected an object with the key 'conversations', got {type(row).__name__}")
    if row.get("video") or row.get("videos"):
        raise RowError("format", "the row has a video, and training takes pictures alone: store some of its frames as images")
    messages = row.get("conversations", row.get("messages"))
    if messages is None:
        keys = ", ".join(map(repr, row)) or "none"
        raise RowError("format", f"expected the key 'conversations' or 'messages', got the keys {keys}")
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise RowError("json", f"'conversations' is a string, but not of JSON: {error}") from error
    if not isinstance(messages, list) or not messages:
        raise RowError("format", "expected a list of messages, and at least one")

    inline: list[Any] = []
    conversations = [_parse_message(message, inline) for message in messages]
    sources: Any = next((row[key] for key in ("image", "images", "image_bytes") if row.get(key) is not None), [])
    if isinstance(sources, str):
        sources = [name.strip() for name in sources.split(",") if name.strip()]
    sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    if inline and sources:
        raise RowError("format", "the row names images both inside its messages and in a column of their own")
    images: list[Any] = [_parse_source(source, store) for source in inline or sources]

    placeholders = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in conversations)
    result = Row(conversations, images)
    if not placeholders and images and all(_is_stand_in(image) for image in images):
        result.images, result.stand_ins = [], len(images)
    elif placeholders > len(images):
        result.removed_placeholders = placeholders - len(images)
        left = len(images)
        for message in conversations:
            pieces = message["content"].split(IMAGE_PLACEHOLDER)
            kept, left = min(left, len(pieces) - 1), max(0, left - (len(pieces) - 1))
            message["content"] = IMAGE_PLACEHOLDER.join(pieces[: kept + 1]) + "".join(pieces[kept + 1 :])
    elif placeholders < len(images):
        result.added_placeholders = len(images) - placeholders
        first = next((message for message in conversations if message["role"] == "user"), conversations[0])
        first["content"] = IMAGE_PLACEHOLDER * result.added_placeholders + "\n" + first["content"]
        # Those that had a placeholder keep it
        result.images = images[placeholders:] + images[:placeholders]
    return result


def _parse_message(message: Any, inline: list[Any]) -> dict[str, str]:
    """A message with a string as its content. Pictures that it holds itself are added to `inline`."""
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise RowError("format", f"expected messages with 'role' and 'content', got {str(message)[:100]}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise RowError("role", f"unknown role {role!r}: expected {', '.join(ROLES)}")
    if isinstance(content, list):
        pieces = []
        for item in content:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "text" and isinstance(item.get("text"), str):
                # In a list, <image> in a text is text: the chat template marks it so too
                pieces.append(item["text"].replace(IMAGE_PLACEHOLDER, f"<{CONTROL_MARK}image>"))
            elif kind == "image":
                pieces.append(IMAGE_PLACEHOLDER)
                inline.extend(item[key] for key in ("image", "path") if item.get(key) is not None)
            else:
                raise RowError("format", f"expected content of type 'text' or 'image', got {str(item)[:100]}")
        content = "".join(pieces)
    if not isinstance(content, str):
        raise RowError("format", f"expected a string or a list as content, got {type(content).__name__}")
    thoughts = message.get("reasoning_content")
    if role == "assistant" and isinstance(thoughts, str) and thoughts:
        content = f"<think>\n{thoughts}\n</think>\n\n{content}"
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise RowError("format", f"the text holds half a surrogate pair, which is no character ({error})") from error
    return {"role": role, "content": content}


def _parse_source(source: Any, store: ImageStore | None) -> str | bytes:
    if isinstance(source, dict):  # as `datasets` keeps an image that is not decoded
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str):
        raise RowError("format", f"expected images as file names or bytes, got {type(source).__name__}")
    if store is None:
        raise RowError("format", f"the row names the image {source!r}, but no image folder was given: pass image_folder")
    try:
        return store.resolve(source)
    except ValueError as error:
        raise RowError("path", str(error)) from error


def _is_stand_in(image: str | bytes) -> bool:
    """Whether this is the black picture of 8x8 that text-only rows in Parquet files carry."""
    if not isinstance(image, bytes) or len(image) > 2048:
        return False
    try:
        with Image.open(io.BytesIO(image)) as picture:
            return picture.size == (8, 8) and max(picture.convert("RGB").tobytes()) <= 4
    except OSError:
        return False


def find_files(names: Iterable[str]) -> list[str]:
    """The files that these names and patterns such as `data/*.jsonl` stand for.

    Raises:
        FileNotFoundError: a name stands for none.
    """
    files = []
    for name in names:
        found = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        if not found:
            raise FileNotFoundError(f"There is no data file {name!r}.")
        files += found
    return files


def read_rows(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """The rows of a JSONL or Parquet file, one by one.

    Yields:
        Where the row is ("line 7", or "row 7" of a Parquet file; both count from 1) and the row, or a `RowError` in its
        place if the line is not JSON. Empty lines are passed over.

    Raises:
        ValueError: the Parquet file is damaged.
    """
    if os.fspath(path).endswith(".parquet"):
        try:
            with pq.ParquetFile(path) as file:
                batches = file.iter_batches(batch_size=256)
                for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
                    yield f"row {number}", row
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: the Parquet file is damaged ({error})") from error
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if not line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                hint = "; a row must be one object on one line" if line in (b"{", b"[") else ""
                row = RowError("json", f"the line is not valid JSON ({error.msg} at column {error.colno}{hint})")
            except (ValueError, RecursionError) as error:  # not UTF-8, an endless number, nesting without end
                row = RowError("json", f"the line is not valid JSON ({error})")
            yield f"line {number}", row
