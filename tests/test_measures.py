"""Measures of answers, by figures that were worked out by hand."""

import math

import pytest

from minimind_v_hf.measures import (
    YesNoScores,
    commonest_right,
    corpus_bleu,
    presence_questions,
    says_yes,
    token_f1,
    wilson_interval,
    yes_no_scores,
)


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("red", "red", 1.0),
        ("Red.", "red", 1.0),
        ("a red ring", "a blue ring", 2 / 3),
        ("red red", "red", 2 / 3),
        ("红色", "红色的", 4 / 5),
        ("左上 ring", "左上", 4 / 5),
        ("", "red", 0.0),
        ("", "…", 1.0),
    ],
)
def test_token_f1(answer, right, expected):
    assert math.isclose(token_f1(answer, right), expected)


def test_bleu():
    pytest.importorskip("sacrebleu")
    assert corpus_bleu(["red", "two"], ["red", "two"]) == pytest.approx(100)
    # By hand: precisions of one to four words, and the same lengths
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert corpus_bleu(["the cat sat on a mat"], ["the cat sat on the mat"]) == pytest.approx(expected)
    # Words would have nothing in common; characters have 3 of 4, 2 of 3, 1 of 2, and 0 of 1, which smoothing makes 1/2
    expected = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert corpus_bleu(["左上红环"], ["左上红球"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        # The roots of |right / asked - p| = z (p (1 - p) / asked)^½, found by bisection
        (81, 263, 0.255289, 0.366210),
        (15, 148, 0.062386, 0.160487),
        (1, 29, 0.006113, 0.171755),
    ],
)
def test_wilson_interval(right, asked, low, high):
    assert wilson_interval(right, asked) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("right", "asked"), [(0, 0), (3, 2), (-1, 2)])
def test_no_interval_of_impossible_counts(right, asked):
    with pytest.raises(ValueError, match="right answers"):
        wilson_interval(right, asked)


def row(question, right, **more):
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": right}], **more}


def test_the_commonest_answer_to_each_form_of_question():
    kinds = [row("A?", "red", kind="colour"), row("B?", "red", kind="colour"), row("C?", "blue", kind="colour")]
    assert commonest_right(kinds) == 2
    assert commonest_right([*kinds, row("A?", "two", kind="count"), row("几？", "红色", kind="colour")]) == 4  # languages apart
    often = [row("<image>\nHow many?", answer) for answer in ["two"] * 6 + ["three"] * 4]
    rare = [row(f"What is {letter}?", answer) for letter, answer in zip("abc", ["red", "two", "red"], strict=True)]
    assert commonest_right(often) == 6
    assert commonest_right([*often, *rare]) == 8  # each rare question alone would know its answer


def test_presence_is_asked_as_often_with_yes_as_with_no():
    contents = [["cat", "dog"], ["cat"], ["cat", "bird", "bird"], ["cat"], ["dog"]]
    asked = presence_questions(contents)
    assert all((name in contents[image]) is there for image, name, there in asked)
    names = sorted((name, there) for _, name, there in asked)
    assert (
        names == [("bird", False), ("bird", True), ("cat", False), ("cat", True)] + [("dog", False)] * 2 + [("dog", True)] * 2
    )
    assert len(set(asked)) == len(asked)
    assert asked == presence_questions(contents) != presence_questions(contents, seed=1)
    assert presence_questions([["sky"], ["sky"]]) == presence_questions([]) == []  # nothing that could be missing
    assert len(presence_questions([["sun"], []] * 2000)) == 1000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", True),
        ("Yes, there is a red ring.", True),
        ("No.", False),
        ("There is no ring.", False),
        ("There isn't.", False),
        ("nobody", None),
        ("ring", None),
        ("", None),
        ("是的", True),
        ("有", True),
        ("没有", False),
        ("不是", False),
        ("红色", None),
    ],
)
def test_yes_and_no(text, expected):
    assert says_yes(text) is expected


def test_yes_no_scores():
    answers = [("yes", "yes")] * 3 + [("no", "yes")] + [("Yes.", "No.")] * 2 + [("no", "no"), ("a cat", "no")]
    expected = YesNoScores(asked=8, right=4, precision=3 / 5, recall=3 / 4, f1=2 / 3, yes=5 / 8, neither=1)
    assert yes_no_scores(answers) == expected
    assert yes_no_scores([*answers, ("yes", "no parking"), ("no", "three")]) == expected  # not questions of that kind
    assert yes_no_scores([("没有", "有"), ("…", "没有")]) == YesNoScores(2, 0, 0.0, 0.0, 0.0, 0.0, 1)
    assert yes_no_scores([("red", "red")]) is None
