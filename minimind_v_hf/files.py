"""Files as they are to be found: never half written, and readable for all whom the umask lets read."""

import os
from pathlib import Path


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, and give it its own when it is whole."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def make_readable(folder: Path) -> None:
    """Give the files of a folder the permissions that new files have: safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~mask)
