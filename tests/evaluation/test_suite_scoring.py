"""Rules against what one works out by hand: letters, matches, error rates, intervals, averages, the table."""

import numpy as np
import pytest

from baichuan_omni_jax.evaluation.suites.report import SuiteScores, table_of
from baichuan_omni_jax.evaluation.suites.scoring import (
    ItemScore,
    choice_letter,
    contains_match,
    count_errors,
    exact_match,
    normalize_text,
    score_groups,
)
from baichuan_omni_jax.evaluation.suites.table import Published

OPTIONS = ("A cat", "a dog", "two", "three")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("**B**", "B"),
        ("(B) a dog", "B"),
        ("B. a dog", "B"),
        ("B\n\nBecause A is wrong.", "B"),
        ("C, two", "C"),
        ("I think C", "C"),
        ("The answer is **C**.", "C"),
        ("Option A is wrong, so the answer is D", "D"),
        ("答案：D", "D"),
        ("答案是B。", "B"),
        ("正确选项为（B）", "B"),
        ("A cat sits there", "A"),
        ("A dog", "B"),
        ("It must be three.", "D"),
        ("A or B", None),
        ("It is a dog, not a cat", None),
        ("nothing of it", None),
        ("", None),
        ("E", None),
    ],
)
def test_the_letter_that_an_answer_chooses(answer, letter):
    assert choice_letter(answer, OPTIONS) == letter


def test_answers_that_match_a_reference():
    assert exact_match("The Paris.", ["paris"])
    assert not exact_match("Paris, France", ["Paris"])
    assert contains_match("It was Paris, of course.", ["rome", "paris"])
    assert not contains_match("Parisian", ["paris"])
    assert contains_match("应该是在北京吧", ["北京"])
    assert not contains_match("anything", [""])


def test_numbers_that_nobody_reads_out_stay_digits():
    """The libraries raise of them: one answer would end the scoring of all."""
    for library in ("whisper_normalizer", "jiwer", "cn2an"):
        pytest.importorskip(library, reason="the extra `evaluate` brings it")
    digits = 40 * "1"
    assert count_errors(f"go {digits}", f"go {digits}", "en") == (0, 2)
    assert count_errors(f"去{digits}", f"去{digits}", "zh")[0] == 0


def test_errors_are_counted_as_others_count_them():
    """Whisper's English normalizer, then its basic one; numbers and titles as spoken, British spelling, fillers."""
    for library in ("whisper_normalizer", "jiwer", "cn2an"):
        pytest.importorskip(library, reason="the extra `evaluate` brings it")
    assert count_errors("Mr. Smith has 2 colors.", "mister smith has two colours", "en") == (0, 5)
    assert count_errors("uh the cat sat on mat", "The cat sat on the mat!", "en") == (1, 6)
    assert count_errors("", "one two", "en")[0] == 1  # "one two" is the number 12
    assert count_errors("noise", "", "en") == (1, 0)
    # One character changed, one left out.
    assert count_errors("你坏", "你好，吗？", "zh") == (2, 3)
    assert normalize_text("共35%，ＯＫ！", "zh") == normalize_text("共百分之三十五 ok", "zh")
    # Edits are summed over the corpus: (1 + 2) / (6 + 3), not the mean of 1/6 and 2/3.
    (score,) = score_groups([ItemScore("all", 1, 6), ItemScore("all", 2, 3)])
    assert score.value == pytest.approx(100 / 3)


def test_scores_of_groups_and_of_all():
    scores = [ItemScore("a", 1), ItemScore("a", 0, invalid=True), ItemScore("a", 1), ItemScore("b", 0)]
    scores += [ItemScore("b", problem="unparsable"), ItemScore("b", problem="bad_media")]
    everything, a, b = score_groups(scores)
    assert (everything.value, a.value, b.value) == pytest.approx((50, 200 / 3, 0))
    assert (everything.items, a.items, b.items) == (4, 3, 1)
    assert (everything.invalid, a.invalid) == (1, 1)
    assert everything.problems == b.problems == {"unparsable": 1, "bad_media": 1}
    assert score_groups(scores, "groups")[0].value == pytest.approx(100 / 3)
    nothing = score_groups([ItemScore("all", problem="unparsable")])[0]
    assert (nothing.value, nothing.low, nothing.items) == (None, None, 0)


def test_intervals_are_those_of_the_binomial_distribution():
    """Of many items the resampled interval comes near mean ± 1.96 standard errors; it is the same each time."""
    right = np.random.default_rng(3).random(2000) < 0.7
    (score,) = score_groups([ItemScore("all", float(each)) for each in right])
    error = 196 * np.sqrt(right.mean() * (1 - right.mean()) / 2000)
    assert score.low == pytest.approx(100 * right.mean() - error, abs=0.3)
    assert score.high == pytest.approx(100 * right.mean() + error, abs=0.3)
    assert score_groups([ItemScore("all", float(each)) for each in right])[0] == score


def test_the_table_has_the_reports_figures_on_their_scale():
    scores = [ItemScore("trivia_qa", 1), ItemScore("trivia_qa", 0), ItemScore("other", problem="not_judged")]
    found = SuiteScores(
        suite="s",
        title="The suite",
        groups=score_groups(scores),
        published={"trivia_qa": Published(5.72, 10), "all": Published(40.5)},
        of_ten=True,
        notes=["judged by hand"],
    )
    head, _, everything, trivia, other, note = table_of(found).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, everything, trivia, other)]
    assert cells[0] == ["The suite", "items", "score %", "95 % interval", "of 10", "report", "left out"]
    assert cells[1] == ["all", "2", "50.0", "0.0 to 100.0", "5.00", "40.5 %", "1 not_judged"]
    assert cells[2] == ["trivia_qa", "2", "50.0", "0.0 to 100.0", "5.00", "5.72 of 10 (57.2 %)", ""]
    assert cells[3] == ["other", "0", "–", "", "", "", "1 not_judged"]
    assert note == "judged by hand"
    assert found.incomplete
