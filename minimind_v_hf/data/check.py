"""Says what a data set holds and what is wrong with it, before a training run finds out.

    python -m minimind_v_hf.data check train.jsonl --images images --model runs/quickstart/model

Reads everything once: rows, turns, images per row, lengths with a histogram, bad JSON, wrong roles, empty answers, missing,
corrupt and duplicate images, placeholders that do not match images, rows that would be cut. The exit status is 0 if all is
well, 1 if there are problems, and 2 if the command itself is wrong.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..configuration_minimind_v import IMAGE_PLACEHOLDER
from ..processing_minimind_v import MiniMindVProcessor
from .images import ImageStore, find_problem, open_image_store, read_image_file
from .rows import Row, RowError, find_files, is_parquet, parquet_errors, parse_row, read_rows
from .tokenizing import CUT, TOO_LONG, ConversationEncoder


_ROWS_AT_ONCE = 512
LONGEST = 32_768
"""Tokens of a row are counted to here, or to the largest `max_lengths`: the text of a huge row is not tokenised to its end."""

BAD_ROWS = {
    "json": "lines that are not JSON",
    "format": "rows of another format",
    "role": "rows with a wrong role",
    "path": "rows whose image leads out of the folder",
}
BAD_IMAGES = {
    "missing": "rows with a missing image",
    "corrupt": "rows with a corrupt image",
    "outside": "rows whose image is a link out of the folder",
}
MISMATCH = f"rows whose {IMAGE_PLACEHOLDER} do not match their images"
EMPTY, NO_ANSWER = "rows with an empty answer", "rows in which no assistant speaks"


@dataclass
class Findings:
    """What a data set holds, and what is wrong with it.

    Args:
        rows: rows read, good or bad.
        turns: number of rows by how many answers they have.
        images: number of rows by how many images they have.
        lengths: of the good rows, in tokens (at most `LONGEST`), or in characters where there is no tokenizer.
        problems: examples by the kind of problem.
        duplicates: pairs of sources with the same bytes.
        cuts: number of rows by (maximum length, what becomes of them).
    """

    rows: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    duplicates: list[str] = field(default_factory=list)
    cuts: Counter[tuple[int, str]] = field(default_factory=Counter)

    def add_problem(self, kind: str, example: str) -> None:
        self.problems.setdefault(kind, []).append(example)


def check(
    files: list[str],
    store: ImageStore | None,
    processor: MiniMindVProcessor | None = None,
    max_lengths: list[int] | None = None,
    num_proc: int | None = None,
) -> Findings:
    """Read a data set once and note everything about it.

    Args:
        files: JSONL or Parquet files.
        store: what names of images are relative to.
        processor: counts tokens; without it, lengths are in characters.
        max_lengths: lengths at which to say how many rows would be cut.
        num_proc: processes that decode images; by default one for each core.
    """
    findings, encode = Findings(), ConversationEncoder(processor) if processor else None
    bad: dict[str, tuple[str, str]] = {}  # sources in a folder or archive, and what is wrong with them
    seen: set[str] = set()
    digests: dict[bytes, str] = {}
    rows = ((f"{file}, {place}", row) for file in files for place, row in read_rows(file))
    progress = tqdm(total=sum(map(_count_rows, files)), unit=" rows", desc="Checking")
    # One process is this one
    with contextlib.nullcontext() if num_proc == 1 else multiprocessing.Pool(num_proc) as pool:
        while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            parsed = list(_parse(chunk, store, findings))
            names = {source for _, row in parsed for source in row.images if isinstance(source, str)}
            inside = [(where, source) for where, row in parsed for source in row.images if isinstance(source, bytes)]
            sources = [(name, name) for name in sorted(names - seen)] + inside
            inspect = functools.partial(_inspect, store=store)
            images = [source for _, source in sources]
            inspected = map(inspect, images) if pool is None else pool.imap(inspect, images, chunksize=16)
            _measure([row for _, row in parsed], encode, max_lengths or [], findings)  # meanwhile
            seen |= names
            for (label, _), (problem, digest) in zip(sources, inspected, strict=True):
                if problem is not None:
                    bad[label] = problem
                elif digests.setdefault(digest, label) != label:
                    findings.duplicates.append(f"{label} is {digests[digest]}")
            for where, row in parsed:
                labels = [source if isinstance(source, str) else where for source in row.images]
                problem = next((bad[label] for label in labels if label in bad), None)
                if problem is not None:
                    findings.add_problem(BAD_IMAGES[problem[0]], f"{where}: {problem[1]}")
            progress.update(len(chunk))
    progress.close()
    return findings


def _parse(chunk: list[tuple[str, Any]], store: ImageStore | None, findings: Findings) -> Iterator[tuple[str, Row]]:
    """The rows that can be understood, with their places; notes what is wrong with their text."""
    for where, raw in chunk:
        findings.rows += 1
        try:
            if isinstance(raw, RowError):
                raise raw
            row = parse_row(raw, store)
        except RowError as error:
            findings.add_problem(BAD_ROWS[error.kind], f"{where}: {error}")
            continue
        answers = [message["content"] for message in row.conversations if message["role"] == "assistant"]
        findings.turns[len(answers)] += 1
        findings.images[len(row.images)] += 1
        if row.mismatch:
            findings.add_problem(MISMATCH, f"{where}: {row.mismatch}")
        if not answers:
            findings.add_problem(NO_ANSWER, where)
        elif not all(answer.strip() for answer in answers):
            findings.add_problem(EMPTY, where)
        yield where, row


def _measure(rows: list[Row], encode: ConversationEncoder | None, max_lengths: list[int], findings: Findings) -> None:
    if encode is None:
        findings.lengths += [sum(len(message["content"]) for message in row.conversations) for row in rows]
        return
    longest = max(LONGEST, *max_lengths)
    for sample in encode([row.conversations for row in rows], longest):
        findings.lengths.append(min(int(sample.counts.sum()), longest))
        findings.cuts.update((max_length, sample.fit(max_length)[1]) for max_length in max_lengths)


def _inspect(source: str | bytes, store: ImageStore | None) -> tuple[tuple[str, str] | None, bytes]:
    """What is wrong with an image, and a digest of its file."""
    problem = find_problem(source, store)
    return problem, b"" if problem else hashlib.blake2b(read_image_file(source), digest_size=16).digest()


def _count_rows(file: str) -> int:
    if is_parquet(file):
        with parquet_errors(file):
            return pq.read_metadata(file).num_rows
    with open(file, "rb") as lines:
        return sum(not line.isspace() for line in lines)


# ── What is printed and drawn ────────────────────────────────────────────────────────────────────────────────────────


def describe_findings(findings: Findings, unit: str, max_lengths: list[int], limit: int) -> str:
    """The report, as text.

    Args:
        findings: what `check` gave.
        unit: of the lengths.
        max_lengths: as given to `check`.
        limit: how many examples of each kind to show; 0 for all. Bad JSON is always shown in full.
    """
    lengths = np.asarray(findings.lengths or [0])
    lines = [
        f"rows             {findings.rows:,}",
        f"answers per row  {_table(findings.turns)}",
        f"images per row   {_table(findings.images)}",
        f"length           {lengths.min():,} to {lengths.max():,} {unit}, median {np.median(lengths):,.0f}, "
        f"mean {lengths.mean():,.0f}",
        *_bars(lengths),
    ]
    for max_length in max_lengths:
        counts = {what: findings.cuts[max_length, what] for what in (CUT, TOO_LONG)}
        title = f"cut at {max_length:,}"
        lines.append(f"{title:<16} {counts[CUT]:,} rows, and {counts[TOO_LONG]:,} dropped, whose prompt alone is longer")
    lines.append("")
    if findings.duplicates:
        lines += _section("!", "images with the same bytes as another (no problem by itself)", findings.duplicates, limit)
    for kind in (*BAD_ROWS.values(), *BAD_IMAGES.values(), MISMATCH, EMPTY, NO_ANSWER):
        if kind in findings.problems:
            lines += _section("✗", kind, findings.problems[kind], 0 if kind == BAD_ROWS["json"] else limit)
    count = sum(map(len, findings.problems.values()))
    if not findings.rows and not count:
        lines.append("✗ There are no rows.")
    else:
        lines.append(f"Problems: {count:,}." if count else "✓ No problems.")
    return "\n".join(lines)


def _table(counts: Counter[int], most: int = 8) -> str:
    """How many rows have how many of something: `1: 90 (90%)   2: 10 (10%)`."""
    shown = sorted(counts.items())[:most]
    cells = [f"{value}: {count:,} ({count / counts.total():.1%})" for value, count in shown]
    rest = counts.total() - sum(count for _, count in shown)
    return "   ".join(cells + ([f"more: {rest:,}"] if rest else [])) or "none"


def _bars(lengths: np.ndarray, width: int = 40) -> list[str]:
    counts, edges = np.histogram(lengths, bins=min(10, int(np.ptp(lengths)) + 1))
    longest = max(counts.max(), 1)
    return [
        f"{round(low):>9,} – {round(high):<7,}{'█' * -(-count * width // longest):<{width}} {count:,}"
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def _section(mark: str, title: str, examples: list[str], limit: int) -> list[str]:
    shown = examples[: limit or None]
    more = len(examples) - len(shown)
    lines = [f"{mark} {title}: {len(examples):,}", *(f"    {example}" for example in shown)]
    return [*lines, *([f"    … and {more:,} more (--limit 0 shows all)"] if more else []), ""]


def draw_histogram(lengths: list[int], unit: str, max_lengths: list[int], path: Path) -> None:
    """Draw how long the rows are, with a line at each maximum length, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.hist(lengths, bins=60, color="#1f5fd0")
    for max_length in max_lengths:
        if max_length <= max(lengths, default=0):
            axis.axvline(max_length, color="#d62728", linestyle="--")
            axis.annotate(f" cut at {max_length}", (max_length, 0.94), xycoords=("data", "axes fraction"), color="#d62728")
    axis.set(xlabel=f"length in {unit}", ylabel="rows", title=f"{len(lengths):,} rows")
    axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m minimind_v_hf.data`."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m minimind_v_hf.data", description="Work on data sets.")
    commands = parser.add_subparsers(required=True, metavar="check")
    command = commands.add_parser(
        "check",
        help=summary,
        description=f"{summary}\n\n{details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("files", nargs="+", help="JSONL or Parquet files, or patterns such as 'data/*.jsonl'")
    command.add_argument("--images", metavar="DIR", help="folder or zip archive that names of images are relative to")
    command.add_argument("--model", metavar="DIR", help="folder of a processor, to count in tokens, not in characters")
    command.add_argument(
        "--max-length",
        type=int,
        nargs="+",
        default=[640, 1536],
        metavar="N",
        help="tell how many rows would be cut at these lengths in tokens (default: 640 1536, of the two stages in 2025)",
    )
    command.add_argument("--histogram", type=Path, default=Path("runs/check/lengths.png"), help="PNG file (%(default)s)")
    command.add_argument("--limit", type=int, default=10, help="examples to show of each problem, 0 for all (%(default)s)")
    command.add_argument("--num-proc", type=int, help="processes that decode images (default: one for each core)")
    options = parser.parse_args(arguments)
    if options.limit < 0 or min(options.max_length) < 1 or (options.num_proc is not None and options.num_proc < 1):
        parser.error("--limit: expected 0 or more; --max-length and --num-proc: expected 1 or more")

    try:
        files = find_files(options.files)
        store = open_image_store(options.images) if options.images else None
        processor = MiniMindVProcessor.from_pretrained(options.model) if options.model else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    max_lengths, unit = (options.max_length, "tokens") if processor else ([], "characters")
    try:
        findings = check(files, store, processor, max_lengths, options.num_proc)
    except (OSError, ValueError) as error:  # a damaged Parquet file, or one that may not be read
        parser.error(str(error))
    print(describe_findings(findings, unit, max_lengths, options.limit))
    if not processor:
        print("Lengths are in characters: pass --model FOLDER to count tokens and rows that would be cut.")
    try:
        draw_histogram(findings.lengths, unit, max_lengths, options.histogram)
        print(f"The histogram of the lengths is in {options.histogram}.")
    except ImportError:
        print("No histogram was drawn, since matplotlib is not installed: pip install matplotlib")
    except OSError as error:
        print(f"No histogram was drawn: {error}")
    return 1 if findings.problems or not findings.rows else 0
