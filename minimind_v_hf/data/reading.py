"""From files to conversations: reads every format of `rows.py`, mends what can be mended, and counts.

The result of `datasets` is cached on disk, memory-mapped, and made again when a file changes. The images themselves stay where
they are; `collator.py` decodes them batch by batch.
"""

import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from ..configuration_minimind_v import IMAGE_PLACEHOLDER
from .images import ImageStore, file_state, find_problem, open_image_store
from .rows import IMAGE_COLUMNS, REPAIRS, Row, RowError, find_files, is_parquet, parquet_errors, parse_row, read_rows


logger = logging.get_logger(__name__)

READING_VERSION = 2
"""Raised with every change to this package that a cached result must not outlive."""


@dataclass
class DataReport:
    """What reading and tokenising came to, of one data set or of several together.

    Args:
        rows: rows read.
        kept: rows left for training.
        images: images in the rows left.
        repaired: number of rows by what was mended in them.
        dropped: number of rows by what was wrong with them.
        examples: the first few of the dropped rows, each with its place and the reason.
    """

    rows: int = 0
    kept: int = 0
    images: int = 0
    repaired: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.kept:,} of {self.rows:,} rows, with {self.images:,} images"]
        for title, counts in (("repaired", self.repaired), ("dropped", self.dropped)):
            lines += [f"  {title:<9}{count:>9,}  {what}" for what, count in counts.items()]
        return "\n".join(lines + [f"    {example}" for example in self.examples])


def load_conversations(
    data_files: str | os.PathLike | Iterable[str | os.PathLike],
    image_folder: str | os.PathLike | None = None,
    *,
    streaming: bool = False,
    strict: bool = False,
    max_dropped: float = 0.01,
    split: str = "train",
    num_proc: int | None = None,
    report: DataReport | None = None,
) -> Dataset | IterableDataset:
    """Read conversations and their images, mend what can be mended, and drop rows whose images cannot be read.

    `rows.py` describes the formats.

    * `<image>` beyond the images are removed; images beyond the `<image>` are put at the front.
    * Every image is decoded once, by all cores if there are many (about 2000 of 256x256 pixels per second and core: 600
      thousand take 5 minutes on one core). The result is cached until a file's size or time changes. A row with a missing
      or corrupt image is dropped.
    * Both are counted in `report`, and logged.

    When streaming, nothing is counted up, but what is dropped is logged; and images are opened, but not decoded: whether their
    pixels are whole, the collator finds out, which decodes them (`MiniMindVCollator(max_dropped=…)`).

    Args:
        data_files: a file, several, or patterns such as `"data/*.jsonl"`; or a Hub data set's id or its local folder.
        image_folder: the folder or zip archive that names of images are relative to.
        streaming: read nothing ahead, and return an `IterableDataset`.
        strict: raise where a row would be mended or dropped.
        max_dropped: the share of rows, from 0 to 1, that may lose something: be dropped, or have `<image>` removed.
        split: of a Hub data set.
        num_proc: processes that check the images; by default one for each core, if there are many images.
        report: is told what was mended and dropped.

    Returns:
        A data set with the columns `conversations` (lists of `{"role", "content"}`) and `images` (lists of sources for
        `images.read_image`: paths, `zip://` references, or, where the data set holds the images, encoded bytes).

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a row cannot be understood, an image's name leads out of the folder, more than `max_dropped` of the
            rows would lose something, `strict` found something, or an option is out of range. The message names file and line.
    """
    if not 0 <= max_dropped <= 1:
        raise ValueError(f"max_dropped={max_dropped}: expected a share from 0 to 1.")
    count_processes(0, num_proc)
    store = None if image_folder is None else open_image_store(image_folder)
    report = DataReport() if report is None else report
    dataset = _read(data_files, store, streaming, strict, split)
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_ImageFilter(store, strict, max_dropped)).select_columns(["conversations", "images"])

    problems = dataset.select_columns(["images"]).map(
        _find_problems,
        batched=True,
        batch_size=256,
        fn_kwargs={"store": store, "state": (READING_VERSION, _signature(dataset))},
        remove_columns=["images"],
        features=Features({"problem": Value("string"), "reason": Value("string"), "num_images": Value("int32")}),
        num_proc=count_processes(len(dataset), num_proc),
        desc="Checking the images",
    )
    counts = {column: _column(dataset, column) for column in REPAIRS}
    kept: list[int] = []
    examples: list[str] = []
    dropped, num_images, num_incomplete = Counter[str](), 0, 0
    for index, row in enumerate(problems):
        problem, reason = row["problem"], row["reason"]
        if problem is None:
            kept.append(index)
            num_images += row["num_images"]
            if not counts["removed_placeholders"][index]:
                continue
            num_incomplete += 1
            reason = f"{counts['removed_placeholders'][index]} {IMAGE_PLACEHOLDER} without an image"
        else:
            dropped[f"{problem} image"] += 1
        refused = problem is not None and (strict or problem == "outside")
        if refused or len(examples) < 5:
            examples.append(f"{dataset[index]['where']}: {reason}")
        if refused:
            raise ValueError(examples[-1])
    check_share(dropped.total() + num_incomplete, len(dataset), max_dropped, examples)

    repaired = +Counter({text: np.count_nonzero(counts[column]) for column, text in REPAIRS.items()})  # + drops the zeros
    report.rows += len(dataset)
    report.kept += len(kept)
    report.images += num_images
    report.repaired.update(repaired)
    report.dropped.update(dropped)
    report.examples += examples
    logger.log(logging.WARNING if repaired or dropped else logging.INFO, f"Read {report}")
    if len(kept) < len(dataset):
        dataset = dataset.select(kept)
    return dataset.select_columns(["conversations", "images"])


def read_conversations(
    data_file: str | os.PathLike, image_folder: str | os.PathLike | None = None
) -> Iterator[tuple[str, dict[str, Any], Row]]:
    """Read a data file row by row, as strictly as `load_conversations(strict=True)`: for evaluation, or for tools.

    Args:
        data_file: JSONL or Parquet.
        image_folder: the folder or zip archive that names of images are relative to.

    Yields:
        Where the row is, what it holds, with whatever further keys it has, and its conversation and images.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there are no rows; a row cannot be understood, has not as many placeholders as images, or has an image
            that leads out of the folder or cannot be read. The message names file and line.
    """
    store = None if image_folder is None else open_image_store(image_folder)
    problem_of = functools.cache(lambda source: find_problem(source, store))
    empty = True
    for file in find_files([os.fspath(data_file)]):
        for place, raw in read_rows(file):
            empty, where = False, f"{file}, {place}"
            row = _understand(raw, where, store, strict=True)
            if problem := next(filter(None, map(problem_of, row.images)), None):
                raise ValueError(f"{where}: {problem[1]}")
            yield where, raw, row
    if empty:
        raise ValueError(f"There are no rows in {os.fspath(data_file)}.")


def _read(data_files, store: ImageStore | None, streaming: bool, strict: bool, split: str) -> Dataset | IterableDataset:
    """All rows, parsed and mended, with a count for each kind of repair."""
    if isinstance(data_files, (str, os.PathLike)):
        data_files = [data_files]
    if not isinstance(data_files, Iterable) or not (names := [os.fspath(file) for file in data_files]):
        raise ValueError(f"data_files={data_files!r}: expected the names of files, and at least one.")
    is_hub_id = len(names) == 1 and re.fullmatch(r"[\w.-]+/[\w.-]+", names[0]) and not os.path.exists(names[0])
    if len(names) == 1 and (os.path.isdir(names[0]) or (is_hub_id and not re.search(r"\.(jsonl?|parquet)$", names[0]))):
        return _read_hub(names[0], store, streaming, strict, split)

    files = find_files(names)
    if not any(True for file in files for _ in read_rows(file)):
        raise ValueError(f"There are no rows in {', '.join(names)}.")
    kinds = {_holds_images(file) for file in files}
    if len(kinds) > 1:
        raise ValueError("Of the data files, one holds images and another names them: load and concatenate them apart.")
    holds_images = kinds == {True}
    # With size and time, so that a cached result is not taken for a file that has changed since
    described = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    state = (READING_VERSION, None if store is None else store.state())
    gen_kwargs = {"files": described, "store": store, "strict": strict, "holds_images": holds_images, "state": state}
    if streaming:
        return IterableDataset.from_generator(_generate, features=_features(holds_images), gen_kwargs=gen_kwargs)
    try:
        return Dataset.from_generator(_generate, features=_features(holds_images), gen_kwargs=gen_kwargs)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _read_hub(name: str, store: ImageStore | None, streaming: bool, strict: bool, split: str) -> Dataset | IterableDataset:
    try:
        dataset = load_dataset(name, split=split, streaming=streaming)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(f"Cannot read the data set {name!r}: {error.__cause__ or error}") from error
    holds_images = False
    for column, feature in (dataset.features or {}).items():
        if "Image(" in str(feature):
            holds_images = True
            undecoded = Image(decode=False)
            dataset = dataset.cast_column(column, undecoded if isinstance(feature, Image) else [undecoded])
        holds_images = holds_images or (column == "image_bytes")

    def parse(row: dict[str, Any], index: int) -> dict[str, Any]:
        row = dict(row)
        for column in {"image", "images"} & row.keys() if holds_images else ():
            images = row[column] if isinstance(row[column], list) else [row[column]]
            row[column] = [_read_left_out(image) for image in images if image]
        where = f"{name}, row {index + 1}"
        return {"where": where, **vars(_understand(row, where, store, strict, holds_images))}

    columns = dataset.column_names or list(next(iter(dataset), {}))
    return dataset.map(parse, with_indices=True, remove_columns=columns, features=_features(holds_images))


def _read_left_out(image: Any) -> Any:
    """The bytes of an image that `datasets` left in a file of its own."""
    if isinstance(image, dict) and not image["bytes"]:
        return Path(image["path"]).read_bytes()
    return image


def _features(holds_images: bool) -> Features:
    return Features(
        {
            "conversations": [{"role": Value("string"), "content": Value("string")}],
            "images": [Value("binary" if holds_images else "string")],
            "where": Value("string"),
            **{column: Value("int32") for column in REPAIRS},
        }
    )


def _holds_images(file: str) -> bool:
    """Whether a data file holds the images themselves, not their names."""
    if not is_parquet(file):
        return False
    with parquet_errors(file):
        schema = pq.read_schema(file)
    return any("binary" in str(schema.field(column).type) for column in IMAGE_COLUMNS if column in schema.names)


def _generate(
    files: list[tuple[str, int, int]], store: ImageStore | None, strict: bool, holds_images: bool, state: Any
) -> Iterator[dict[str, Any]]:
    """The rows of the data set. `state` is what else the result depends on, for the cache."""
    for path, _, _ in files:
        for place, row in read_rows(path):
            where = f"{path}, {place}"
            yield {"where": where, **vars(_understand(row, where, store, strict, holds_images))}


def _understand(row: Any, where: str, store: ImageStore | None, strict: bool = False, holds_images: bool | None = None) -> Row:
    """`parse_row` with errors that name the place. All images of a file must be of one kind, as `holds_images` has it."""
    try:
        if isinstance(row, RowError):
            raise row
        parsed = parse_row(row, store)
        if holds_images is not None and any(isinstance(image, bytes) != holds_images for image in parsed.images):
            kinds = ("names an image", "holds images") if holds_images else ("holds an image", "names images")
            raise RowError("format", f"the row {kinds[0]}, but the file {kinds[1]}")
    except RowError as error:
        advice = "`python -m minimind_v_hf.data check` lists everything that is wrong with a file."
        raise ValueError(f"{where}: {error}. {advice}") from error
    if strict and parsed.mismatch:
        raise ValueError(f"{where}: {parsed.mismatch}.")
    return parsed


def _find_problems(batch: dict[str, list], store: ImageStore | None, state: Any) -> dict[str, list]:
    """The first problem of each row's images. `state` is what else the result depends on, for the cache."""
    found = {source: find_problem(source, store) for sources in batch["images"] for source in sources}
    rows = [next(filter(None, map(found.get, sources)), (None, None)) for sources in batch["images"]]
    return {
        "problem": [problem for problem, _ in rows],
        "reason": [reason for _, reason in rows],
        "num_images": [len(sources) for sources in batch["images"]],
    }


class _ImageFilter:
    """Lets rows with good images through, one by one, and stops when too many have lost something."""

    def __init__(self, store: ImageStore | None, strict: bool, max_dropped: float):
        self.store, self.strict, self.max_dropped = store, strict, max_dropped
        self.rows = self.lost = 0

    def __call__(self, row: dict[str, Any]) -> bool:
        self.rows += 1
        problem = next(filter(None, (find_problem(source, self.store, decode=False) for source in row["images"])), None)
        removed = row["removed_placeholders"]
        if problem is None and not removed:
            return True
        message = f"{row['where']}: {problem[1] if problem else f'{removed} {IMAGE_PLACEHOLDER} without an image'}"
        if problem and (self.strict or problem[0] == "outside"):
            raise ValueError(message)
        self.lost += 1
        logger.warning(f"Dropped a row with a {problem[0]} image: {message}" if problem else f"Mended {message}")
        check_share(self.lost, max(self.rows, 1000), self.max_dropped, [message])
        return problem is None


def check_share(lost: int, rows: int, max_dropped: float, examples: list[str]) -> None:
    """Raise ValueError, with examples, where more rows are lost than `max_dropped` allows."""
    if lost > max_dropped * rows:
        raise ValueError(
            f"{lost:,} of {rows:,} rows have missing or corrupt images, or {IMAGE_PLACEHOLDER} without one: more than the "
            f"share of {max_dropped:.1%} that max_dropped allows. Is it the right image folder? Mend the data, or raise "
            "max_dropped. The first of them:\n  " + "\n  ".join(examples)
        )


def _signature(dataset: Dataset) -> str:
    """Changes when any of the image files does, in size or time."""
    digest = hashlib.sha256()
    if "binary" in str(dataset.features["images"]):
        return ""  # the data set holds the images
    for batch in dataset.select_columns(["images"]).iter(batch_size=10_000):
        for source in sorted({source for sources in batch["images"] for source in sources}):
            digest.update(f"{source} {file_state(source)}".encode())
    return digest.hexdigest()


def _column(dataset: Dataset, column: str) -> np.ndarray:
    """A column of numbers (rows,)."""
    return np.asarray([value for batch in dataset.select_columns([column]).iter(batch_size=10_000) for value in batch[column]])


def count_processes(rows: int, num_proc: int | None = None) -> int | None:
    """As many processes as asked for, or as there are cores, but none for work of a few seconds.

    Raises:
        ValueError: less than one is asked for.
    """
    if num_proc is not None:
        if not isinstance(num_proc, int) or num_proc < 1:
            raise ValueError(f"num_proc={num_proc}: expected a positive number of processes.")
        return num_proc
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores, rows // 2000)
    return processes if processes > 1 else None
