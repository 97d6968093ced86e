"""How a script ends when its user can mend what is wrong: with one line instead of a traceback."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Around what a script does: an error in what it was given is one line on stderr, with exit code 2; Ctrl-C too, with 130.

    TRANSFORMERS_VERBOSITY=debug shows the traceback as well.
    """
    try:
        yield
        return
    except (OSError, ValueError, ImportError) as error:
        logger.debug("The traceback:", exc_info=True)
        text, code = str(error), 2
        if "Original Traceback" in text:  # from a process that loads data
            text = text.strip().rpartition("\n")[2].partition(": ")[2]
        message = f"error: {' '.join(text.split())}"
    except KeyboardInterrupt as interrupt:
        message, code = f"stopped. {interrupt}".strip(), 130
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)
