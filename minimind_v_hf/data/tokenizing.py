"""From conversations to token ids and labels, once: `datasets` caches the result."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from transformers.utils import logging

from ..processing_minimind_v import MiniMindVProcessor
from .reading import READING_VERSION, DataReport, count_processes


logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
"""The label of a position from which nothing is learned."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant that can see.",
    "Answer the user's questions about pictures.",
    "Look closely, then answer briefly.",
    "You are MiniMind-V, a small model for pictures and text.",
    "你是一个能看懂图片的助手。",
    "请根据图片回答用户的问题。",
    "仔细观察，简要回答。",
    "你是MiniMind-V，一个小巧的视觉语言模型。",
)
"""What `tokenize_conversations(random_system=…)` draws from."""

KEPT, CUT = "kept", "cut at max_length"
TOO_LONG, NOTHING_TO_LEARN = "the prompt alone exceeds max_length", "the assistant says nothing"


def tokenize_conversations(
    dataset: Dataset | IterableDataset,
    processor: MiniMindVProcessor,
    max_length: int | None = None,
    *,
    random_system: float = 0.0,
    drop_empty_thinking: float = 0.0,
    seed: int = 0,
    num_proc: int | None = None,
    report: DataReport | None = None,
) -> Dataset | IterableDataset:
    """Turn conversations into token ids and labels, once; `datasets` caches the result.

    Args:
        dataset: with the columns `conversations` and `images`, as `load_conversations` gives them.
        processor: its chat template marks what is to be learned.
        max_length: longer samples are cut, before an image rather than inside it; those whose prompt alone is longer are
            dropped. By default nothing is cut.
        random_system: the probability that a conversation without a system message gets one of `SYSTEM_PROMPTS` (minimind-3
            of 2026: 0.2). Drawn once for each row.
        drop_empty_thinking: the probability that the empty `<think>` blocks of a conversation are left out (2026: 0.8).
        seed: of those draws.
        num_proc: processes; by default one for each core, if there are many rows.
        report: is told what was cut and dropped.

    Returns:
        A data set with the columns `input_ids`, `labels` (-100 but where the assistant speaks), `images` and `length` (in
        tokens).

    Raises:
        ValueError: nothing is left to learn from, or an option is out of range.
    """
    for name, share in (("random_system", random_system), ("drop_empty_thinking", drop_empty_thinking)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share}: expected a probability from 0 to 1.")
    if drop_empty_thinking and "drop_empty_thinking" not in processor.chat_template:
        raise ValueError("drop_empty_thinking: the processor's chat template does not know this option.")
    if max_length is not None and not isinstance(max_length, int):
        raise TypeError(f"max_length={max_length!r}: expected a number of tokens.")
    if max_length is not None and max_length <= processor.image_seq_length:
        raise ValueError(f"max_length={max_length}: an image alone takes {processor.image_seq_length} tokens.")
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError("The data set has nothing to learn from: no rows are left.")
    count_processes(0, num_proc)
    encode = ConversationEncoder(processor)
    features = Features(
        {
            "input_ids": [Value("int32")],
            "labels": [Value("int32")],
            "images": dataset.features["images"],
            "length": Value("int32"),
            "lost_images": Value("int32"),
            "outcome": Value("string"),
        }
    )

    def tokenize(batch: dict[str, list], indices: list[int], version: int) -> dict[str, list]:
        draws = [random.Random(f"{seed} {index}") for index in indices]
        conversations = [
            [{"role": "system", "content": draw.choice(SYSTEM_PROMPTS)}, *messages]
            if draw.random() < random_system and messages[0]["role"] != "system"
            else messages
            for draw, messages in zip(draws, batch["conversations"], strict=True)
        ]
        without_blocks = [draw.random() < drop_empty_thinking for draw in draws]
        rows: dict[str, list] = {column: [] for column in features}
        for sample, images in zip(encode(conversations, max_length, without_blocks), batch["images"], strict=True):
            sample, outcome = sample.fit(max_length)
            num_images = int(sample.is_image.sum())
            if num_images > len(images) or (outcome == KEPT and num_images < len(images)):
                raise ValueError(f"The chat template writes {num_images} images where a conversation has {len(images)}.")
            rows["input_ids"].append(sample.input_ids)
            rows["labels"].append(sample.labels)
            rows["images"].append(images[:num_images])
            rows["lost_images"].append(len(images) - (num_images if _is_kept(outcome) else 0))
            rows["length"].append(len(sample.input_ids))
            rows["outcome"].append(outcome)
        return rows

    options: dict[str, Any] = {
        "batched": True,
        "with_indices": True,
        "fn_kwargs": {"version": READING_VERSION},
        "remove_columns": dataset.column_names,
        "features": features,
    }
    if isinstance(dataset, IterableDataset):
        kept = dataset.map(tokenize, batch_size=64, **options).filter(_is_kept, input_columns=["outcome"])
        return kept.remove_columns(["outcome", "lost_images"])

    tokenized = dataset.map(tokenize, num_proc=count_processes(len(dataset), num_proc), desc="Tokenising", **options)
    outcomes = Counter(outcome for batch in tokenized.select_columns(["outcome"]).iter(10_000) for outcome in batch["outcome"])
    dropped = Counter({what: outcomes[what] for what in (TOO_LONG, NOTHING_TO_LEARN) if outcomes[what]})
    if dropped.total() == len(tokenized):
        reasons = ", ".join(f"{what}: {count}" for what, count in dropped.items())
        raise ValueError(f"The data set has nothing to learn from ({reasons}; max_length={max_length}).")
    if outcomes[CUT] or dropped:
        counts = [f"{count:,} rows {what}" for what, count in ((CUT, outcomes[CUT]), *dropped.items()) if count]
        logger.warning(f"Tokenised {len(tokenized):,} rows. Cut or dropped: {'; '.join(counts)}.")
    if report is not None:
        report.kept -= dropped.total()
        report.images -= sum(sum(batch["lost_images"]) for batch in tokenized.select_columns(["lost_images"]).iter(10_000))
        report.repaired.update({CUT: outcomes[CUT]} if outcomes[CUT] else {})
        report.dropped.update(dropped)
    if dropped:
        tokenized = tokenized.filter(_is_kept, input_columns=["outcome"], desc="Dropping rows that do not fit")
    return tokenized.remove_columns(["outcome", "lost_images"])


def _is_kept(outcome: str) -> bool:
    return outcome in (KEPT, CUT)


@dataclass
class Sample:
    """A conversation as token ids, where each image is still one token.

    Args:
        ids: token ids (tokens,).
        learned: whether the assistant says this token (tokens,).
        is_image: whether this token is an image (tokens,).
        image_seq_length: how many tokens the model reads in place of an image.
    """

    ids: np.ndarray
    learned: np.ndarray
    is_image: np.ndarray
    image_seq_length: int

    @property
    def counts(self) -> np.ndarray:
        """How many tokens the model reads in place of each (tokens,)."""
        return np.where(self.is_image, self.image_seq_length, 1)

    @property
    def input_ids(self) -> np.ndarray:
        return self.ids.repeat(self.counts)

    @property
    def labels(self) -> np.ndarray:
        return np.where(self.learned & ~self.is_image, self.ids, IGNORE_INDEX).repeat(self.counts)

    def fit(self, max_length: int | None) -> tuple["Sample", str]:
        """The sample cut to `max_length`, and what became of it."""
        if not self.learned.any():
            return self, NOTHING_TO_LEARN
        ends = self.counts.cumsum()
        if max_length is None or ends[-1] <= max_length:
            return self, KEPT
        fitting = int(ends.searchsorted(max_length, side="right"))
        cut = Sample(self.ids[:fitting], self.learned[:fitting], self.is_image[:fitting], self.image_seq_length)
        return cut, CUT if cut.learned.any() else TOO_LONG


class ConversationEncoder:
    """Conversations to samples, with the processor's chat template. Holds what `datasets` can hash and send to processes."""

    def __init__(self, processor: MiniMindVProcessor):
        self.tokenizer, self.chat_template = processor.tokenizer, processor.chat_template
        self.image_token_id, self.image_seq_length = processor.image_token_id, processor.image_seq_length
        self.longest_token = max(map(len, self.tokenizer.get_vocab()))  # in characters, or in bytes, which are not fewer

    def __call__(
        self,
        conversations: list[list[dict[str, str]]],
        max_length: int | None = None,
        drop_empty_thinking: list[bool] | None = None,
    ) -> list[Sample]:
        """Encode conversations.

        Args:
            conversations: with strings as contents.
            max_length: what lies behind so many tokens may be left out of a sample, which is still longer than that.
            drop_empty_thinking: of each conversation, whether to leave out its empty `<think>` blocks.
        """
        drop_empty_thinking = drop_empty_thinking or [False] * len(conversations)
        samples: list[Any] = [None] * len(conversations)
        shortened = conversations
        if max_length is not None:
            shortened = [_shorten(messages, max_length + 1, self.longest_token) for messages in conversations]
        for drop in set(drop_empty_thinking):
            indices = [index for index, dropped in enumerate(drop_empty_thinking) if dropped == drop]
            encoded = self.tokenizer.apply_chat_template(
                [shortened[index] for index in indices],
                chat_template=self.chat_template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                drop_empty_thinking=drop,
            )
            for index, ids, learned in zip(indices, encoded["input_ids"], encoded["assistant_masks"], strict=True):
                ids = np.asarray(ids)
                sample = Sample(ids, np.asarray(learned, bool), ids == self.image_token_id, self.image_seq_length)
                if shortened[index] != conversations[index] and sample.counts.sum() <= max_length:
                    # The template or the tokenizer left text out, so that what was cut off may count
                    sample = self([conversations[index]], None, [drop])[0]
                samples[index] = sample
        return samples


def _shorten(messages: list[dict[str, str]], tokens: int, longest_token: int) -> list[dict[str, str]]:
    """A conversation cut to what so many tokens can hold, or a little more; an answer stays one, and thoughts stay thoughts."""
    characters = tokens * longest_token
    shortened: list[dict[str, str]] = []
    answered = False
    for message in messages:
        if characters <= 0 and (answered or message["role"] != "assistant"):
            continue
        answered = answered or message["role"] == "assistant"
        content = message["content"][: max(characters, 0)]
        characters -= len(content) + longest_token  # each message takes tokens of its own
        if "</think>" in message["content"][len(content) :]:  # by which templates tell thoughts from the answer
            content = message["content"] if "</think>" in content else content + "</think>"
        shortened.append({**message, "content": content})
    return shortened
