"""From data files to batches.

    load_conversations      JSONL, Parquet, Hub  ──►  conversations, images
    tokenize_conversations                       ──►  input_ids, labels, images, length
    pack                                         ──►  rows of several samples
    MiniMindVCollator                            ──►  a batch of tensors

`rows.py` describes the formats. `read_conversations` reads the rows of one file for other uses, such as an evaluation.

What is wrong with a data set as a whole, a command says:

    python -m minimind_v_hf.data check train.jsonl --images images
"""

from .collator import MiniMindVCollator, PixelNormalizer, RandomAffine
from .packing import PackedDataset, group_by_fit, pack
from .reading import DataReport, load_conversations, read_conversations
from .tokenizing import IGNORE_INDEX, SYSTEM_PROMPTS, tokenize_conversations


__all__ = [
    "IGNORE_INDEX",
    "SYSTEM_PROMPTS",
    "DataReport",
    "MiniMindVCollator",
    "PackedDataset",
    "PixelNormalizer",
    "RandomAffine",
    "group_by_fit",
    "load_conversations",
    "pack",
    "read_conversations",
    "tokenize_conversations",
]
