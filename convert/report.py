"""What the converters print: aligned tables on the standard output, and one line on the standard error when they stop."""

import sys
from collections.abc import Callable, Iterable, Sequence

from transformers.utils import logging

from convert.native_files import ConversionError


def print_table(title: str, rows: Iterable[Sequence[str]]) -> None:
    """Print rows in aligned columns under a title."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    print(f"\n{title}")
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(("  " + "   ".join(cells)).rstrip())
    sys.stdout.flush()


def shorten(names: Sequence[str], limit: int = 3) -> str:
    """The first few of many names."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"


def warn(message: str) -> None:
    """Something that does not stop the conversion, but that the user should know."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def run(convert: Callable[[], None]) -> int:
    """Run a conversion. Returns the exit code: 2 where it cannot be done, after one line that says why."""
    logging.set_verbosity_error()  # our reports say what transformers would, tensor by tensor
    logging.disable_progress_bar()
    try:
        convert()
    except (ConversionError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
