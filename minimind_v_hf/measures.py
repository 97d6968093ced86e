"""Measures of answers: how right they are, how sure that is, what needs no image, and what is seen that is not there.

The rows are those of `examples/evaluate.py`: a conversation that ends with the right answer, and the model's "answer".
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


HAN = "㐀-鿿豈-﫿"
WORD = re.compile(f"[{HAN}]|[^\\W{HAN}]+")  # a Chinese character, or a word of anything else
PLAIN = {"yes", "no", "是", "是的", "不是", "否", "有", "没有", "对", "不对"}
YES = re.compile(r"\byes\b|^[是有对]", re.IGNORECASE)
NO = re.compile(r"\b(no|not)\b|n't\b|^[不没否无]", re.IGNORECASE)
FREQUENT = 10  # rows that ask the same, from which on a question is a form of its own
PRESENCE_QUESTIONS = 1000  # at most, and at least two for each name


def right_answer(row: dict[str, Any]) -> str:
    """What the conversation of a row ends with."""
    return row["conversations"][-1]["content"].strip()


def choices_problem(row: dict[str, Any]) -> str | None:
    """Why a row's "choices" cannot be those of its question, if it has any that cannot."""
    right, choices = row["conversations"][-1]["content"], row.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        return f"expected a list of texts as choices, got {choices!r}"
    if choices is not None and right not in choices:
        return f"the right answer {right!r} is not among its choices"
    return None


# ── How right ────────────────────────────────────────────────────────────────────────────────────────────────────────


def token_f1(answer: str, right: str) -> float:
    """Harmonic mean of precision and recall over words and Chinese characters; 1 where neither text has any."""
    given, wanted = (WORD.findall(text.lower()) for text in (answer, right))
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted)) if given or wanted else 1.0


def corpus_bleu(answers: list[str], right: list[str]) -> float | None:
    """BLEU from 0 to 100; None where sacrebleu is not installed."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return None
    chinese = any(re.search(f"[{HAN}]", text) for text in right)
    return BLEU(tokenize="zh" if chinese else "13a", effective_order=True).corpus_score(answers, [right]).score


def wilson_interval(right: int, asked: int) -> tuple[float, float]:
    """The shares between which the true one lies with a confidence of 95%, by Wilson's score interval.

    Raises:
        ValueError: `right` is not between 0 and `asked`, or nothing was asked.
    """
    if not 0 <= right <= asked or asked < 1:
        raise ValueError(f"Expected 0 to {asked} right answers of at least one, got {right}.")
    z = 1.959964  # standard deviations of the normal distribution that hold 95%
    share, shrink = right / asked, 1 + z * z / asked
    centre = (share + z * z / (2 * asked)) / shrink
    spread = z / shrink * (share * (1 - share) / asked + z * z / (4 * asked * asked)) ** 0.5
    return max(0.0, centre - spread), min(1.0, centre + spread)


# ── What needs no image ──────────────────────────────────────────────────────────────────────────────────────────────


def commonest_right(rows: Sequence[dict[str, Any]]) -> int:
    """How many rows are answered rightly by the commonest right answer to each form of question.

    Rows of one form have the same "kind" and language; those without a kind, the same question, or they are asked by fewer
    than ten rows.
    """
    questions = [row["conversations"][-2]["content"].strip() for row in rows]
    often = Counter(questions)
    forms: dict[tuple, Counter] = {}
    for row, question in zip(rows, questions, strict=True):
        chinese = bool(re.search(f"[{HAN}]", right_answer(row)))
        form = row.get("kind") or (question if often[question] >= FREQUENT else None)
        forms.setdefault((form, chinese), Counter())[right_answer(row)] += 1
    return sum(answers.most_common(1)[0][1] for answers in forms.values())


# ── What is seen that is not there ───────────────────────────────────────────────────────────────────────────────────


def presence_questions(contents: Sequence[Iterable[str]], seed: int = 0) -> list[tuple[int, str, bool]]:
    """What to ask of images whose contents are known: is this there? After POPE (Li et al. 2023), as often with yes as with no.

    Each name is asked of as many images that have it as of others that lack it, so neither the name nor a habit of saying yes
    helps. A name that all images have, or none, is not asked.

    Args:
        contents: the names of what each image shows.
        seed: of the choice of images.

    Returns:
        The image's index, the name, and whether it is there; at most about a thousand, the images in order.
    """
    shown = [set(names) for names in contents]
    vocabulary = sorted(set().union(*shown))
    rng = random.Random(seed)
    most = max(1, PRESENCE_QUESTIONS // (2 * len(vocabulary) or 1))
    asked = []
    for name in vocabulary:
        having, lacking = ([i for i, names in enumerate(shown) if (name in names) is there] for there in (True, False))
        number = min(len(having), len(lacking), most)
        asked += [(i, name, True) for i in rng.sample(having, number)] + [(i, name, False) for i in rng.sample(lacking, number)]
    return sorted(asked)


def says_yes(text: str) -> bool | None:
    """Whether an answer, in English or Chinese, says yes (True) or no (False); None if it says neither."""
    text = text.strip()
    return False if NO.search(text) else True if YES.search(text) else None


class YesNoScores(NamedTuple):
    """How questions with yes or no are answered. All but the counts are from 0 to 1.

    Args:
        asked: how many questions.
        right: how many of them rightly.
        precision: of those answered with yes, the share that is so; 0 if there are none.
        recall: of those that are so, the share that is answered with yes; 0 if there are none.
        f1: harmonic mean of the two.
        yes: the share that is answered with yes. Far above the share that is so, it tells of things seen that are not there.
        neither: how many answers say neither; they count as wrong.
    """

    asked: int
    right: int
    precision: float
    recall: float
    f1: float
    yes: float
    neither: int


def yes_no_scores(answers: Iterable[tuple[str, str]]) -> YesNoScores | None:
    """The scores of answers whose right ones are a plain yes or no; None if there are no such.

    Args:
        answers: each with the right one. Those with another right answer do not count.
    """
    plain = [(answer, right) for answer, right in answers if right.strip(" .!。！").lower() in PLAIN]
    counts = Counter((says_yes(answer), says_yes(right)) for answer, right in plain)
    if not counts:
        return None
    hits = counts[True, True]
    claimed, are_so = hits + counts[True, False], hits + counts[False, True] + counts[None, True]
    return YesNoScores(
        asked=len(plain),
        right=hits + counts[False, False],
        precision=hits / claimed if claimed else 0.0,
        recall=hits / are_so if are_so else 0.0,
        f1=2 * hits / (claimed + are_so) if claimed + are_so else 0.0,
        yes=claimed / len(plain),
        neither=counts[None, True] + counts[None, False],
    )
