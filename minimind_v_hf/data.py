"""From files on disk to token ids: reads data sets in the MiniMind-V format and tokenises them once.

The pictures stay on disk, as paths; `collator.py` decodes them batch by batch.
"""

import os
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from .processing_minimind_v import IMAGE_PLACEHOLDER, MiniMindVProcessor


IGNORE_INDEX = -100
"""The label of a position from which nothing is learned."""


def load_conversations(data_file: str | os.PathLike, image_folder: str | os.PathLike) -> Dataset:
    """Read a JSONL file in the MiniMind-V format.

    A row is `{"conversations": [{"role": …, "content": "…<image>…"}, …], "image": "a.jpg"}`, where `image` may name
    several files, separated by commas, or be absent.

    Args:
        data_file: the JSONL file.
        image_folder: the folder that the names in `image` are relative to.

    Returns:
        A data set with the columns `conversations` and `images` (lists of paths).

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the rows have no conversations, or a row has more or fewer images than placeholders.
    """
    for path, kind in ((Path(data_file), "data file"), (Path(image_folder), "image folder")):
        if not path.exists():
            raise FileNotFoundError(f"There is no {kind} {str(path)!r}.")
    dataset = load_dataset("json", data_files=str(data_file), split="train")
    if "conversations" not in dataset.column_names:
        raise ValueError(
            f"{data_file}: expected rows with the key 'conversations', got the keys {', '.join(dataset.column_names)}."
        )
    root = str(image_folder)

    def resolve(row: dict[str, Any], index: int) -> dict[str, Any]:
        names = [name.strip() for name in (row.get("image") or "").split(",") if name.strip()]
        placeholders = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in row["conversations"])
        if placeholders != len(names):
            raise ValueError(
                f"{data_file}, row {index} (counted from 0): {placeholders} {IMAGE_PLACEHOLDER} placeholders, "
                f"but {len(names)} images: {names}."
            )
        return {"images": [os.path.join(root, name) for name in names]}

    return dataset.map(resolve, with_indices=True, desc="Reading conversations").select_columns(["conversations", "images"])


def tokenize_conversations(dataset: Dataset, processor: MiniMindVProcessor) -> Dataset:
    """Turn conversations into token ids, once; `datasets` caches the result.

    Args:
        dataset: with the columns `conversations` and `images`, as `load_conversations` gives them.
        processor: its chat template marks what is to be learned.

    Returns:
        A data set with the columns `input_ids`, `labels` (−100 but where the assistant speaks) and `images`.
    """
    tokenizer, image_token_id = processor.tokenizer, processor.image_token_id

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer.apply_chat_template(
            batch["conversations"],
            chat_template=processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        rows: dict[str, list] = {"input_ids": [], "labels": []}
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
            counts = [processor.image_seq_length if token == image_token_id else 1 for token in ids]
            labels = [
                token if learned and token != image_token_id else IGNORE_INDEX for token, learned in zip(ids, mask, strict=True)
            ]
            rows["input_ids"].append([token for token, count in zip(ids, counts, strict=True) for _ in range(count)])
            rows["labels"].append([label for label, count in zip(labels, counts, strict=True) for _ in range(count)])
        return rows

    return dataset.map(tokenize, batched=True, remove_columns=["conversations"], desc="Tokenising")
