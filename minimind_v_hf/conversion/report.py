"""What the converters say: aligned tables on the standard output, warnings on the standard error, and why they stop."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class ConversionError(ValueError):
    """Why a conversion cannot be done, for the person who asked for it."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Whatever a library raises on files that it cannot read, as a ConversionError that begins with what was being done."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"{what} ({first_line[:300]})") from error


def print_table(title: str, rows: Iterable[Sequence[object]]) -> None:
    """Print rows in aligned columns under a title."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for row in cells:
        print(("  " + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip())
    sys.stdout.flush()


def shorten(names: Sequence[str], limit: int = 3) -> str:
    """The first few of many names."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"


def warn(message: str) -> None:
    """What does not stop the conversion, but the user should know."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
