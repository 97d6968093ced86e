"""From files to conversations: reads every format of MiniMind-V, repairs and counts.

`rows.py` understands a row, `images.py` a picture. The result of `datasets` is cached on disk, memory-mapped, and made again
when a file changes. The pictures themselves stay where they are; `collator.py` decodes them batch by batch.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from ..configuration_minimind_v import IMAGE_PLACEHOLDER
from .images import ImageStore, file_state, find_problem, open_image_store
from .rows import REPAIRS, RowError, find_files, parse_row, read_rows


logger = logging.get_logger(__name__)

READING_VERSION = 1  # raised with every change to the code below that a cached result must not outlive


@dataclass
class DataReport:
    """What reading and tokenising a data set came to. One report follows one data set through the functions below.

    Args:
        rows: rows read.
        kept: rows left for training.
        images: pictures in the rows left.
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
    """Read conversations and their images, mend what can be mended, and drop rows whose pictures cannot be read.

    Formats: JSONL with `conversations` and `image` ("a.jpg", or "0.jpg, 1.jpg"); JSONL, Parquet or Hub data sets with
    `messages` and `images`, whose contents may be lists; Parquet with `conversations` as JSON and `image_bytes`.

    * `<image>` beyond the images are removed; images beyond the `<image>` are put at the front.
    * Every picture is decoded once, by all cores if there are many (about 2000 of 256x256 pixels per second and core: 600
      thousand take 5 minutes on one core). The result is cached until a file's size or time changes. A row with a missing
      or corrupt picture is dropped.
    * Both are counted in `report`, and logged.

    When streaming, pictures are looked at as they pass; nothing is counted up, but what is dropped is logged.

    Args:
        data_files: a file, several, or patterns such as `"data/*.jsonl"`; or a Hub data set's id or its local folder.
        image_folder: the folder or zip archive that names of images are relative to.
        streaming: read nothing ahead, and return an `IterableDataset`.
        strict: raise where a row would be mended or dropped.
        max_dropped: the share of rows that may be dropped.
        split: of a Hub data set.
        num_proc: processes that look at the pictures; by default one for each core, if there are many pictures.
        report: is told what was mended and dropped.

    Returns:
        A data set with the columns `conversations` (lists of `{"role", "content"}`) and `images` (lists of sources for
        `images.read_image`: paths, `zip://` references, or, where the data set holds the pictures, encoded bytes).

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a row cannot be understood, an image's name leads out of the folder, more than `max_dropped` of the
            rows would be dropped, or `strict` found something. The message names file and line.
    """
    store = None if image_folder is None else open_image_store(image_folder)
    report = DataReport() if report is None else report
    dataset = _read(data_files, store, streaming, strict, split)
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_Sieve(store, strict, max_dropped)).select_columns(["conversations", "images"])

    problems = dataset.select_columns(["images"]).map(
        _find_problems,
        batched=True,
        batch_size=256,
        fn_kwargs={"store": store, "state": (READING_VERSION, _signature(dataset))},
        remove_columns=["images"],
        features=Features({"problem": Value("string"), "reason": Value("string"), "num_images": Value("int32")}),
        num_proc=num_proc or count_processes(len(dataset)),
        desc="Looking at the images",
    )
    kept: list[int] = []
    examples: list[str] = []
    dropped, images = Counter[str](), 0
    for index, row in enumerate(problems):
        if row["problem"] is None:
            kept.append(index)
            images += row["num_images"]
            continue
        refused = strict or row["problem"] == "outside"
        if refused or len(examples) < 5:
            examples.append(f"{dataset[index]['where']}: {row['reason']}")
        if refused:
            raise ValueError(examples[-1])
        dropped[f"{row['problem']} image"] += 1
    _check_share(len(dataset) - len(kept), len(dataset), max_dropped, examples)

    repaired = +Counter({text: _count_nonzero(dataset, column) for column, text in REPAIRS.items()})  # + drops the zeros
    report.rows += len(dataset)
    report.kept += len(kept)
    report.images += images
    report.repaired.update(repaired)
    report.dropped.update(dropped)
    report.examples += examples
    logger.log(logging.WARNING if repaired or dropped else logging.INFO, f"Read {report}")
    if len(kept) < len(dataset):
        dataset = dataset.select(kept)
    return dataset.select_columns(["conversations", "images"])


def _read(data_files, store: ImageStore | None, streaming: bool, strict: bool, split: str) -> Dataset | IterableDataset:
    """All rows, parsed and mended, with a count for each kind of repair."""
    names = [os.fspath(data_files)] if isinstance(data_files, (str, os.PathLike)) else list(map(os.fspath, data_files))
    is_hub_id = len(names) == 1 and re.fullmatch(r"[\w.-]+/[\w.-]+", names[0]) and not os.path.exists(names[0])
    if len(names) == 1 and (os.path.isdir(names[0]) or (is_hub_id and not re.search(r"\.(jsonl?|parquet)$", names[0]))):
        return _read_hub(names[0], store, streaming, strict, split)

    files = find_files(names)
    if not any(True for file in files for _ in read_rows(file)):
        raise ValueError(f"There are no rows in {', '.join(names)}.")
    kinds = {_holds_pictures(file) for file in files}
    if len(kinds) > 1:
        raise ValueError("Some of the data files hold pictures and others name them: load and concatenate them apart.")
    # With size and time, so that a cached result is not taken for a file that has changed since
    described = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    state = (READING_VERSION, None if store is None else store.state())
    gen_kwargs = {"files": described, "store": store, "strict": strict, "state": state}
    features = _features(pictures_inside=kinds == {True})
    if streaming:
        return IterableDataset.from_generator(_generate, features=features, gen_kwargs=gen_kwargs)
    try:
        return Dataset.from_generator(_generate, features=features, gen_kwargs=gen_kwargs)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _read_hub(name: str, store: ImageStore | None, streaming: bool, strict: bool, split: str) -> Dataset | IterableDataset:
    dataset = load_dataset(name, split=split, streaming=streaming)
    pictures_inside = False
    for column, feature in (dataset.features or {}).items():
        if "Image(" in str(feature):
            pictures_inside = True
            undecoded = Image(decode=False)
            dataset = dataset.cast_column(column, undecoded if isinstance(feature, Image) else [undecoded])
        pictures_inside = pictures_inside or (column == "image_bytes")

    def parse(row: dict[str, Any], index: int) -> dict[str, Any]:
        row = dict(row)
        for column, value in row.items():
            if pictures_inside and column in ("image", "images"):
                row[column] = [_embed(picture) for picture in (value if isinstance(value, list) else [value]) if picture]
        return _parse_strictly(row, f"{name}, row {index + 1}", store, strict)

    columns = dataset.column_names or list(next(iter(dataset)))
    features = _features(pictures_inside)
    return dataset.map(parse, with_indices=True, remove_columns=columns, features=features)


def _embed(picture: Any) -> Any:
    """The bytes of a picture that `datasets` left in a file of its own."""
    if isinstance(picture, dict) and not picture["bytes"]:
        return Path(picture["path"]).read_bytes()
    return picture


def _features(pictures_inside: bool) -> Features:
    return Features(
        {
            "conversations": [{"role": Value("string"), "content": Value("string")}],
            "images": [Value("binary" if pictures_inside else "string")],
            "where": Value("string"),
            **{column: Value("int32") for column in REPAIRS},
        }
    )


def _holds_pictures(file: str) -> bool:
    """Whether a data file holds the pictures themselves, not their names."""
    if not file.endswith(".parquet"):
        return False
    try:
        schema = pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: the Parquet file is damaged ({error})") from error
    columns = [column for column in ("image", "images", "image_bytes") if column in schema.names]
    return any("binary" in str(schema.field(column).type) for column in columns)


def _generate(files: list[tuple[str, int, int]], store: ImageStore | None, strict: bool, state: Any) -> Iterator[dict]:
    for path, _, _ in files:
        for place, row in read_rows(path):
            yield _parse_strictly(row, f"{path}, {place}", store, strict)


def _parse_strictly(row: Any, where: str, store: ImageStore | None, strict: bool) -> dict[str, Any]:
    """`parse_row` as a row of the data set; its errors name the place."""
    try:
        if isinstance(row, RowError):
            raise row
        parsed = parse_row(row, store)
    except RowError as error:
        advice = "`python -m minimind_v_hf.data check` lists everything that is wrong with a file."
        raise ValueError(f"{where}: {error}. {advice}") from error
    placeholders = len(parsed.images) + parsed.removed_placeholders - parsed.added_placeholders
    if strict and (parsed.removed_placeholders or parsed.added_placeholders):
        raise ValueError(f"{where}: {placeholders} {IMAGE_PLACEHOLDER} placeholders, but {len(parsed.images)} images.")
    return {"where": where, **vars(parsed)}


def _find_problems(batch: dict[str, list], store: ImageStore | None, state: Any) -> dict[str, list]:
    """The first problem of each row's pictures. `state` is what else the result depends on, for the cache."""
    found = {source: find_problem(source, store) for sources in batch["images"] for source in sources}
    rows = [next(filter(None, map(found.get, sources)), (None, None)) for sources in batch["images"]]
    return {
        "problem": [problem for problem, _ in rows],
        "reason": [reason for _, reason in rows],
        "num_images": [len(sources) for sources in batch["images"]],
    }


class _Sieve:
    """Lets rows with good pictures through, one by one, and stops when too many are bad."""

    def __init__(self, store: ImageStore | None, strict: bool, max_dropped: float):
        self.store, self.strict, self.max_dropped = store, strict, max_dropped
        self.seen = self.dropped = 0

    def __call__(self, row: dict[str, Any]) -> bool:
        self.seen += 1
        problem = next(filter(None, (find_problem(source, self.store) for source in row["images"])), None)
        if problem is None:
            return True
        message = f"{row['where']}: {problem[1]}"
        if self.strict or problem[0] == "outside":
            raise ValueError(message)
        self.dropped += 1
        logger.warning(f"Dropped a row with a {problem[0]} image: {message}")
        _check_share(self.dropped, max(self.seen, 1000), self.max_dropped, [message])
        return False


def _check_share(dropped: int, rows: int, max_dropped: float, examples: list[str]) -> None:
    if dropped > max_dropped * rows:
        raise ValueError(
            f"{dropped:,} of {rows:,} rows have missing or corrupt images, more than the share of {max_dropped:.1%} that may "
            "be dropped. Is it the right image folder? Mend the data, or raise max_dropped. The first of them:\n  "
            + "\n  ".join(examples)
        )


def _signature(dataset: Dataset) -> str:
    """Changes when any of the image files does; looks at sizes and times alone."""
    digest = hashlib.sha256()
    if "binary" in str(dataset.features["images"]):
        return ""  # the data set holds the pictures
    for batch in dataset.select_columns(["images"]).iter(batch_size=10_000):
        for source in sorted({source for sources in batch["images"] for source in sources}):
            digest.update(f"{source} {file_state(source)}".encode())
    return digest.hexdigest()


def _count_nonzero(dataset: Dataset, column: str) -> int:
    return sum(int(np.count_nonzero(batch[column])) for batch in dataset.select_columns([column]).iter(batch_size=10_000))


def count_processes(rows: int) -> int | None:
    """As many processes as there are cores, but none for work of a few seconds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores, rows // 2000)
    return processes if processes > 1 else None
