"""The images of a data set: finds them in a folder or a zip archive, reads them, and says what is wrong with one.

Names come from data that somebody else wrote: none may lead out of the folder, wait for a pipe, or fill the memory.
"""

import functools
import os
import posixpath
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from PIL import Image

from ..image_reading_minimind_v import load_image, open_image


MAX_FILE_SIZE = 256 * 2**20
"""Larger files, in bytes, are not read: an image of as many pixels as `load_image` allows takes this much as RGB."""

_ZIP_SCHEME = "zip://"


@dataclass(frozen=True)
class ImageStore:
    """A folder or a zip archive that the names of images are relative to.

    Args:
        root: the real path of the folder or archive; `open_image_store` finds it.
    """

    root: str

    def resolve(self, name: str) -> str:
        """Where the image of this name is: a path, or `zip://MEMBER::ARCHIVE`.

        Raises:
            ValueError: the name is absolute or climbs with `..`, or no file can have it.
        """
        if "\0" in name or name.encode(errors="replace").decode() != name:
            raise ValueError(f"the image {name!r} cannot be the name of a file")
        path = PureWindowsPath(name)  # which takes both kinds of slashes for what they are
        if path.anchor or ".." in path.parts:
            raise ValueError(f"the image {name!r} leads out of {self.root!r}: expected a relative path without '..'")
        if not path.parts:
            raise ValueError(f"the image {name!r} names no file")
        if os.path.isdir(self.root):
            return os.path.join(self.root, name)
        members, folder = _members(_archive(self.root))
        name = posixpath.normpath(name)
        return f"{_ZIP_SCHEME}{name if name in members else folder + name}::{self.root}"

    def state(self) -> tuple[int, int] | None:
        """Size and time of an archive: what `resolve` depends on beyond the root."""
        return None if os.path.isdir(self.root) else file_state(self.root)

    def contains(self, source: str) -> bool:
        """Whether a resolved path is inside the folder when every symbolic link is followed."""
        return source.startswith(_ZIP_SCHEME) or os.path.realpath(source).startswith(os.path.join(self.root, ""))


def open_image_store(path: str | os.PathLike) -> ImageStore:
    """The folder or zip archive at this path.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is neither, or the archive is damaged.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no image folder or zip archive {os.fspath(path)!r}.")
    if not os.path.isdir(path):
        if not os.path.isfile(path) or not zipfile.is_zipfile(path):
            raise ValueError(f"{os.fspath(path)}: expected a folder of images or a zip archive.")
        try:
            _archive(os.path.realpath(path))
        except Exception as error:  # damaged tables of contents raise errors of many kinds
            raise ValueError(f"{os.fspath(path)}: the zip archive is damaged ({error}).") from error
    return ImageStore(os.path.realpath(path))


@functools.lru_cache(maxsize=8)
def _open_archive(path: str, changed: int, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _archive(path: str) -> zipfile.ZipFile:
    # Opened once in each process: forked ones would share the position in the file
    return _open_archive(path, os.stat(path).st_mtime_ns, os.getpid())


@functools.lru_cache(maxsize=8)
def _members(archive: zipfile.ZipFile) -> tuple[frozenset[str], str]:
    """The names in an archive, and the one folder that holds them all (as when a folder was zipped), or ''."""
    names = frozenset(archive.namelist())
    folders = {name.partition("/")[0] for name in names}
    return names, folders.pop() + "/" if len(folders) == 1 and all("/" in name for name in names) else ""


def read_image_file(source: str | bytes) -> bytes:
    """The encoded bytes behind a source: a path, `zip://MEMBER::ARCHIVE`, or already bytes.

    Raises:
        FileNotFoundError: there is no such file, or no such member in the archive.
        ValueError: it is no regular file, larger than `MAX_FILE_SIZE`, damaged, encrypted, or cannot be read.
    """
    if isinstance(source, bytes):
        return source
    try:
        if not source.startswith(_ZIP_SCHEME):
            status = os.stat(source)
            _check_file(status.st_size, stat.S_ISDIR(status.st_mode), stat.S_ISREG(status.st_mode))
            return Path(source).read_bytes()
        member, _, archive = source.removeprefix(_ZIP_SCHEME).rpartition("::")
        info = _archive(archive).getinfo(member)
        _check_file(info.file_size, info.is_dir())
        with _archive(archive).open(info) as file:
            return file.read(info.file_size + 1)  # whatever comes out, and not a byte more than was declared
    except (FileNotFoundError, KeyError, NotADirectoryError) as error:
        raise FileNotFoundError("there is no such file") from error
    except Exception as error:  # each compression has errors of its own
        raise ValueError(str(error) or type(error).__name__) from error


def _check_file(size: int, is_folder: bool, is_regular: bool = True) -> None:
    if is_folder:
        raise ValueError("it is a folder")
    if not is_regular:
        raise ValueError("it is no regular file")
    if size > MAX_FILE_SIZE:
        raise ValueError(f"the file has {size:,} bytes, more than {MAX_FILE_SIZE >> 20} MiB")


def file_state(source: str) -> tuple[int, int] | None:
    """Size and time of an image's file, or of its archive, by which a change shows; None if there is no such file."""
    try:
        status = os.stat(source.rpartition("::")[2] if source.startswith(_ZIP_SCHEME) else source)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def read_image(source: Any, min_size: int | None = None) -> Image.Image:
    """`load_image` for whatever a data set's `images` column holds: `zip://MEMBER::ARCHIVE` too.

    Raises:
        ValueError: the image cannot be read; the message names it.
    """
    try:
        in_archive = isinstance(source, str) and source.startswith(_ZIP_SCHEME)
        return load_image(read_image_file(source) if in_archive else source, min_size)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"Cannot read the image {describe(source)}: {error}") from error


def find_problem(source: str | bytes, store: ImageStore | None, decode: bool = True) -> tuple[str, str] | None:
    """What is wrong with an image: ("outside", "missing" or "corrupt", reason), or None.

    It is decoded to its last byte, which for a JPEG costs a third of full decoding: the smallest of its sizes is asked for.
    With `decode=False` its kind and its size are all that is looked at.
    """
    if isinstance(source, str) and store is not None and not store.contains(source):
        return "outside", f"{describe(source)}: a symbolic link leads out of {store.root!r}"
    try:
        encoded = read_image_file(source)
        load_image(encoded, min_size=1) if decode else open_image(encoded)
    except FileNotFoundError as error:
        return "missing", f"{describe(source)}: {error}"
    except ValueError as error:
        return "corrupt", f"{describe(source)}: {error}"
    return None


def describe(source: Any) -> str:
    """A source in an error message."""
    return repr(source) if isinstance(source, (str, os.PathLike)) else f"<{type(source).__name__}>"
