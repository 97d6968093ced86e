"""One row of a data file, in any of MiniMind-V's formats: finds the files, reads their rows, and understands each.

A row is an object: a line of a JSONL file, or a row of a Parquet file. It has

* a conversation as `conversations` or `messages`: a list of `{"role": …, "content": …}`, or a string that is JSON of one. Roles
  are system, user and assistant. A content is a string, in which `<image>` stands for an image; or a list of
  `{"type": "text", "text": …}` and `{"type": "image"}`, in whose texts `<image>` is text. What an assistant has as
  `reasoning_content` becomes a `<think>` block.
* its images, in the order of their placeholders, in one column: `image` ("a.jpg", or "0.jpg, 1.jpg"), `images` (a list of
  names) or `image_bytes` (encoded files, in Parquet). Or each is named in its item of a content list, by one of the keys
  `image`, `path` and `url`. Names are relative to a folder or zip archive. Addresses on the network are refused.

A row that is understood has strings as contents and one `<image>` for each image, whatever it had before.
"""

import glob
import io
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..configuration_minimind_v import CONTROL_MARK, IMAGE_PLACEHOLDER
from .images import ImageStore


ROLES = ("system", "user", "assistant")
IMAGE_COLUMNS = ("image", "images", "image_bytes")
IMAGE_KEYS = ("image", "path", "url", "base64")
"""What an image in a content list can be named by; base64 is refused with advice."""

_MAX_LINE = 64 * 2**20  # bytes


class RowError(ValueError):
    """A row that cannot be understood. `kind` is "json", "format", "role" or "path"."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass
class Row:
    """A conversation as training wants it: contents are strings, with one `<image>` for each image.

    Args:
        conversations: `{"role", "content"}` of each message.
        images: paths, `zip://` references or encoded bytes, in the order of their placeholders.
        removed_placeholders: how many `<image>` had no image.
        added_placeholders: how many images had no `<image>`.
        dummy_images: how many black images of 8x8 were left out of a text-only row.
    """

    conversations: list[dict[str, str]]
    images: list[str] | list[bytes]
    removed_placeholders: int = 0
    added_placeholders: int = 0
    dummy_images: int = 0

    @property
    def mismatch(self) -> str | None:
        """How many placeholders and images the row had, if not as many of each."""
        if not self.removed_placeholders and not self.added_placeholders:
            return None
        placeholders = len(self.images) + self.removed_placeholders - self.added_placeholders
        return f"{placeholders} {IMAGE_PLACEHOLDER} placeholders, but {len(self.images)} images"


REPAIRS = {
    "removed_placeholders": f"{IMAGE_PLACEHOLDER} without an image: the last ones were removed",
    "added_placeholders": f"images without {IMAGE_PLACEHOLDER}: put at the front",
    "dummy_images": "text-only rows with a black image of 8x8: it was left out",
}


# ── Understanding a row ──────────────────────────────────────────────────────────────────────────────────────────────


def parse_row(row: Any, store: ImageStore | None) -> Row:
    """Understand a row in any of the formats, and make its placeholders match its images.

    Args:
        row: as described above.
        store: what names of images are relative to.

    Raises:
        RowError: the row is of another form, or an image's name leads out of the folder.
    """
    if not isinstance(row, dict):
        raise RowError("format", f"expected an object with the key 'conversations', got {type_name(row)}")
    for medium, advice in (("video", ": store frames of it as images"), ("audio", "")):
        if row.get(medium) or row.get(f"{medium}s"):
            raise RowError("format", f"the row has {medium}, and training takes images alone{advice}")
    inline: list[Any] = []
    conversations = [_parse_message(message, inline) for message in _find_messages(row)]
    sources = _find_sources(row)
    if any(source is not None for source in inline):
        if sources:
            raise RowError("format", "the row names images both inside its messages and in a column of their own")
        if None in inline:
            raise RowError("format", f"{inline.count(None)} of {len(inline)} image items have no source")
        sources = inline
    elif not sources and (column := next((key for key, value in row.items() if _names_image(value)), None)) is not None:
        expected = ", ".join(IMAGE_COLUMNS)
        raise RowError("format", f"the row names an image in the column {shorten(column)}: expected one of {expected}")
    return _match(conversations, [_parse_source(source, store) for source in sources])


def _find_messages(row: dict[str, Any]) -> list[Any]:
    given = [key for key in ("conversations", "messages") if row.get(key) is not None]
    if len(given) == 2:
        raise RowError("format", "the row has both 'conversations' and 'messages'")
    key = given[0] if given else next((key for key in ("conversations", "messages") if key in row), None)
    if key is None:
        keys = ", ".join(map(shorten, row)) or "none"
        raise RowError("format", f"expected the key 'conversations' or 'messages', got the keys {keys}")
    messages = row[key]
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except RecursionError as error:
            raise RowError("json", f"{key!r} is a string, but not of JSON: it is nested too deeply") from error
        except ValueError as error:
            raise RowError("json", f"{key!r} is a string, but not of JSON: {error}") from error
    if not isinstance(messages, list):
        raise RowError("format", f"expected a list of messages as {key!r}, got {type_name(messages)}")
    if not messages:
        raise RowError("format", "expected a list of messages, and at least one")
    return messages


def _parse_message(message: Any, inline: list[Any]) -> dict[str, str]:
    """A message with a string as its content. The source of each image item, or None, is added to `inline`."""
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise RowError("format", f"expected messages with 'role' and 'content', got {shorten(message)}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise RowError("role", f"unknown role {shorten(role)}: expected {', '.join(ROLES)}")
    if lost := [key for key in (*IMAGE_KEYS, "images", "value") if message.get(key) is not None]:
        raise RowError(
            "format", f"a message with {lost[0]!r} beside its 'content': name images in the row or in a content list"
        )
    if message.get("tool_calls"):
        raise RowError("format", "a message has tool calls, which the model does not learn")
    if isinstance(content, list):
        content = "".join(_parse_item(item, inline) for item in content)
    if not isinstance(content, str):
        raise RowError("format", f"expected a string or a list as content, got {type_name(content)}")
    thoughts = message.get("reasoning_content")
    if not isinstance(thoughts, str | None):
        raise RowError("format", f"expected a string as reasoning_content, got {type_name(thoughts)}")
    if role == "assistant" and thoughts:
        content = f"<think>\n{thoughts}\n</think>\n\n{content}"
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise RowError("format", f"the text holds half a surrogate pair, which is no character ({error.reason})") from error
    return {"role": role, "content": content}


def _parse_item(item: Any, inline: list[Any]) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise RowError("format", f"expected a string as text, got {type_name(item.get('text'))}")
        if lost := [key for key in (*IMAGE_KEYS, "images") if item.get(key) is not None]:
            raise RowError("format", f"a text with {lost[0]!r}: expected an item of type 'image' for an image")
        # In a list, <image> in a text is text: the chat template marks it so too
        return item["text"].replace(IMAGE_PLACEHOLDER, f"<{CONTROL_MARK}image>")
    if kind == "image":
        if item.get("text") is not None:
            raise RowError("format", "an image with 'text': expected an item of type 'text' for a text")
        source = _source_of(item)
        others = [key for key, value in item.items() if key != "type" and value is not None]
        if source is None and others:
            raise RowError("format", f"an image without a source (image, path or url): got {shorten(others[0])}")
        inline.append(source)
        return IMAGE_PLACEHOLDER
    raise RowError("format", f"expected content of type 'text' or 'image', got {shorten(item)}")


def _source_of(item: dict[str, Any]) -> Any:
    """The one source that an object names, or None."""
    given = [key for key in IMAGE_KEYS if item.get(key) is not None]
    if len(given) > 1:
        raise RowError("format", f"an image with several sources: {', '.join(given)}")
    if given == ["base64"]:
        raise RowError("format", "an image as base64: store it as a file, or as bytes in a Parquet file's column image_bytes")
    return item[given[0]] if given else None


def _find_sources(row: dict[str, Any]) -> list[Any]:
    given = [key for key in IMAGE_COLUMNS if row.get(key) is not None and row[key] not in ("", [])]
    if len(given) > 1:
        raise RowError("format", f"the row has images in several columns: {', '.join(map(repr, given))}")
    sources = row[given[0]] if given else []
    if isinstance(sources, str):
        return [name.strip() for name in sources.split(",") if name.strip()]
    return sources if isinstance(sources, list) else [sources]


def _names_image(value: Any) -> bool:
    """Whether a column that is not read holds the name of an image file, or a list of such."""
    value = value[0] if isinstance(value, list) and value else value
    return isinstance(value, str) and re.fullmatch(r"[^\n]+\.(jpe?g|png|webp|gif|bmp|tiff?)", value.strip(), re.I) is not None


def _parse_source(source: Any, store: ImageStore | None) -> str | bytes:
    if isinstance(source, dict):  # as `datasets` keeps an image that is not decoded: its bytes, and perhaps its name
        source = source.get("bytes") or _source_of(source)
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str):
        raise RowError("format", f"expected images as file names or bytes, got {type_name(source)}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", source):
        raise RowError("format", f"the image {shorten(source)} is a URL, and training reads files: put it in the image folder")
    if store is None:
        raise RowError("format", f"the row names the image {shorten(source)}, but no image folder was given: pass image_folder")
    try:
        return store.resolve(source)
    except ValueError as error:
        raise RowError("path", str(error)) from error


def _match(conversations: list[dict[str, str]], images: list[Any]) -> Row:
    """The row with as many placeholders as images, and a count of what that took."""
    placeholders = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in conversations)
    row = Row(conversations, images)
    if not placeholders and images and all(map(_is_dummy, images)):
        row.images, row.dummy_images = [], len(images)
    elif placeholders > len(images):
        row.removed_placeholders = placeholders - len(images)
        left = len(images)
        for message in conversations:
            pieces = message["content"].split(IMAGE_PLACEHOLDER)
            kept, left = min(left, len(pieces) - 1), max(0, left - (len(pieces) - 1))
            message["content"] = IMAGE_PLACEHOLDER.join(pieces[: kept + 1]) + "".join(pieces[kept + 1 :])
    elif placeholders < len(images):
        row.added_placeholders = len(images) - placeholders
        first = next((message for message in conversations if message["role"] == "user"), conversations[0])
        first["content"] = IMAGE_PLACEHOLDER * row.added_placeholders + "\n" + first["content"]
        # Those that had a placeholder keep it
        row.images = images[placeholders:] + images[:placeholders]
    return row


def _is_dummy(image: str | bytes) -> bool:
    """Whether this is the black image of 8x8 that text-only rows in Parquet files carry."""
    if not isinstance(image, bytes) or len(image) > 2048:
        return False
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.size == (8, 8) and max(opened.convert("RGB").tobytes()) <= 4
    except (OSError, ValueError, SyntaxError):
        return False


def type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def shorten(value: Any) -> str:
    """A value in an error message, however large or deep it is."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 100
    return shortener.repr(value)


# ── Reading files ────────────────────────────────────────────────────────────────────────────────────────────────────


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


def is_parquet(file: str | os.PathLike) -> bool:
    return os.fspath(file).endswith(".parquet")


@contextmanager
def parquet_errors(file: str | os.PathLike) -> Iterator[None]:
    """Names the file where pyarrow finds it damaged.

    Raises:
        ValueError: it is.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # also of text and dates that none can be
        if isinstance(error, OSError) and error.errno is not None:  # which names the file itself
            raise
        raise ValueError(f"{os.fspath(file)}: the Parquet file is damaged ({error})") from error


def read_rows(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """The rows of a JSONL or Parquet file, one by one.

    Yields:
        Where the row is ("line 7", or "row 7" of a Parquet file; both count from 1) and the row, or a `RowError` in its
        place if the line is not JSON. Empty lines are passed over.

    Raises:
        ValueError: the Parquet file is damaged.
    """
    if is_parquet(path):
        with parquet_errors(path), pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=256)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
                yield f"row {number}", row
        return
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE + 1), b""), start=1):
            if len(line) > _MAX_LINE:
                raise ValueError(f"{os.fspath(path)}, line {number}: the line is longer than {_MAX_LINE >> 20} MiB")
            if line := line.strip():
                yield f"line {number}", _parse_line(line)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        reason = "it is nested too deeply"
    except json.JSONDecodeError as error:
        hint = "; a row must be one object on one line" if line in (b"{", b"[") else ""
        reason = f"{error.msg} at column {error.colno}{hint}"
    except ValueError as error:  # not UTF-8, an endless number
        reason = str(error)
    return RowError("json", f"the line is not valid JSON ({reason})")
