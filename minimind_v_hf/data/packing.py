"""Packing: which samples share a row, so that hardly a token is padding.

`collator.py` lays the samples of a row side by side; each keeps its own positions and attends to itself alone.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset


def group_by_fit(lengths: Sequence[int], max_length: int, seed: int = 0) -> list[list[int]]:
    """Share out samples among rows of `max_length` tokens: the longest first, each into the fullest row that has room.

    Args:
        lengths: of the samples, in tokens.
        max_length: of a row.
        seed: decides which of several equally long samples comes first.

    Returns:
        The indices of the samples in each row.

    Raises:
        ValueError: a sample is longer than a row.
    """
    if len(lengths) and max(lengths) > max_length:
        raise ValueError(
            f"A sample of {max(lengths)} tokens does not fit into a row of {max_length}: tokenize with max_length={max_length}."
        )
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-np.asarray(lengths)[order], kind="stable")]
    groups: list[list[int]] = []
    rooms: list[int] = []  # how much room rows have left, each value once, ascending
    rows_with_room: dict[int, list[list[int]]] = {}
    group: list[int]
    for index in order.tolist():
        length = lengths[index]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, group = max_length, []
            groups.append(group)
        else:
            room = rooms[place]
            group = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rooms[place], rows_with_room[room]
        group.append(index)
        room -= length
        if room not in rows_with_room:
            rows_with_room[room] = []
            insort(rooms, room)
        rows_with_room[room].append(group)
    return groups


class PackedDataset(torch.utils.data.Dataset):
    """Rows of several samples: `{"samples": [sample, …]}`. Holds indices alone; the samples stay in `dataset`.

    Args:
        dataset: of samples.
        groups: the indices of the samples in each row.
    """

    def __init__(self, dataset: Dataset, groups: list[list[int]]):
        self.dataset = dataset
        # Two arrays rather than many lists, which worker processes would copy as they count references
        self.order = np.fromiter((index for group in groups for index in group), np.int64)
        self.ends = np.cumsum([len(group) for group in groups])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, list[dict[str, Any]]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        start = self.ends[index - 1] if index else 0
        columns = self.dataset[self.order[start : self.ends[index]].tolist()]
        return {"samples": [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]}


def pack(dataset: Dataset | IterableDataset, max_length: int, seed: int = 0) -> PackedDataset | IterableDataset:
    """Pack samples into rows of at most `max_length` tokens, for `MiniMindVCollator`.

    Args:
        dataset: as `tokenize_conversations` gives it. When streaming, every thousand samples are packed among themselves.
        max_length: the longest row, in tokens.
        seed: decides which of several equally long samples meet.

    Returns:
        Rows `{"samples": [sample, …]}`.

    Raises:
        ValueError: a sample is longer than a row.
    """
    if isinstance(dataset, Dataset):
        lengths = [length for batch in dataset.select_columns(["length"]).iter(10_000) for length in batch["length"]]
        return PackedDataset(dataset, group_by_fit(lengths, max_length, seed))

    def pack_batch(columns: dict[str, list]) -> dict[str, list]:
        samples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        groups = group_by_fit(columns["length"], max_length, seed)
        return {"samples": [[samples[index] for index in group] for group in groups]}

    return dataset.map(pack_batch, batched=True, batch_size=1000, remove_columns=dataset.column_names)
