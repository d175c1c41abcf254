"""Rewards of Section 3.1: tables of cases, one name a row, then properties of any text."""

import doctest
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

import rewards
from rewards import accuracy_reward, check_solution, extract_answer, format_reward

TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
SOLUTIONS = {  # one of each type, for the tests of all types
    "multiple choice": "B",
    "numerical": "1,234.5",
    "OCR": "No Entry",
    "free-form": "A rabbit stretches its arms.",
    "regression": "12.5",
}


def score(answer: str, solution: str, problem_type: str) -> float:
    return accuracy_reward(f"<think>So.</think><answer>{answer}</answer>", solution, problem_type)


def test_the_docstring_examples_hold():
    result = doctest.testmod(rewards)
    assert result.attempted >= 7 and result.failed == 0


@pytest.mark.parametrize(
    "response, expected",
    [
        pytest.param("<think>x</think><answer> B\n</answer>", "B", id="stripped"),
        pytest.param("<answer>A</answer> no: <answer>B</answer>", "B", id="last-pair"),
        pytest.param("<answer>A</answer> or <answer>C", "A", id="last-complete-pair"),
        pytest.param("<answer>A<answer>B</answer>C</answer>", "B", id="nested-innermost"),
        pytest.param("B", None, id="bare-text"),
        pytest.param("<answer>B", None, id="unclosed"),
        pytest.param("B</answer>", None, id="unopened"),
        pytest.param("<ANSWER>B</ANSWER>", None, id="upper-case-tags"),
    ],
)
def test_extract_answer(response, expected):
    assert extract_answer(response) == expected


@pytest.mark.parametrize(
    "response, expected",
    [
        pytest.param("<think>a</think><answer>b</answer>", 1.0, id="plain"),
        pytest.param(" \n<think>a\nb</think>\n\n<answer>c\nd</answer>\n", 1.0, id="white-space"),
        pytest.param("<think></think><answer></answer>", 1.0, id="empty-parts"),
        pytest.param("<answer>b</answer>", 0.0, id="no-thought"),
        pytest.param("<think>a</think>so<answer>b</answer>", 0.0, id="text-between"),
        pytest.param("Well <think>a</think><answer>b</answer>", 0.0, id="text-before"),
        pytest.param("<think>a<answer>b</answer></think>", 0.0, id="answer-inside-thought"),
        pytest.param("<think>a</think><answer>b", 0.0, id="cut-off"),
        pytest.param("<think>a<think>b</think><answer>c</answer>", 0.0, id="two-thoughts"),
        pytest.param("<Think>a</Think><answer>b</answer>", 0.0, id="upper-case-tags"),
    ],
)
def test_format_reward(response, expected):
    assert format_reward(response) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        pytest.param("B", 1.0, id="letter"),
        pytest.param("B.", 1.0, id="point"),
        pytest.param("[B]", 1.0, id="square-brackets"),
        pytest.param("(B) left", 1.0, id="brackets-and-text"),
        pytest.param("B. A is wrong", 1.0, id="rest-is-not-searched"),
        pytest.param("A. not B", 0.0, id="first-letter-counts"),
        pytest.param("A", 0.0, id="other-letter"),
        pytest.param("B left", 0.0, id="letter-and-word"),
        pytest.param("(B]", 0.0, id="unlike-brackets"),
        pytest.param("It is B.", 0.0, id="sentence"),
        pytest.param("\u0412", 0.0, id="cyrillic-ve"),
    ],
)
def test_multiple_choice(answer, expected):
    assert score(answer, "<answer>B</answer>", "multiple choice") == expected


@pytest.mark.parametrize("solution", ["c", "(C)", "C. left", "<answer> C </answer>", "[c]"])
def test_a_choice_solution_is_read_like_an_answer(solution):
    assert score("C", solution, "multiple choice") == 1.0
    assert score("A", solution, "multiple choice") == 0.0


EQUAL_NUMBERS = [
    ("1.0", "1"), ("1e3", "1000"), ("-0", "0"), ("0e99", "0.00"), ("+5", "5"), (".5", "0.5"),
    ("5.", "5"), ("-.5", "-0.50"), ("007", "7"), ("1,234.5e-3", "1.2345"), ("1E+2", "100"),
    ("12,345,678", "12345678"), (" 42\n", "42"), ("10e999999999", "1e1000000000"), ("100", "1e2"),
]  # fmt: skip
DIFFERENT_NUMBERS = [
    ("-5", "5"), ("3.14", "3.141"), ("1e999999999", "1e999999998"), ("12", "21"), ("10", "1"),
    ("0.1", "0.01"), ("9007199254740993", "9007199254740992"), ("2", "0"),
]  # fmt: skip
NO_NUMBERS = [
    "", ".", "-", "e5", "5e", "1_000", "1,00", "1,0000", "1234,567", ",234", "1,,234", "1,234,",
    "--5", "- 5", "5 5", "1.2.3", "12 m", "50%", "$5", "0x10", "nan", "sNaN", "inf", "-Infinity",
    "1/2", "five",
    "\u0665", "\uff15", "\u00b2", "\u22125", "5e1.5", "1.5,000", "5\x00", "\ud800", "1e" + "9" * 19,
]  # fmt: skip


@pytest.mark.parametrize("answer, solution", EQUAL_NUMBERS)
def test_equal_decimals_score_one(answer, solution):
    assert score(answer, solution, "numerical") == 1.0
    assert score(solution, answer, "numerical") == 1.0


@pytest.mark.parametrize("answer, solution", DIFFERENT_NUMBERS)
def test_different_decimals_score_zero(answer, solution):
    assert score(answer, solution, "numerical") == 0.0


@pytest.mark.parametrize("answer", NO_NUMBERS, ids=ascii)
def test_what_is_no_number_scores_zero(answer):
    assert rewards.parse_decimal(answer) is rewards.parse_float(answer) is None
    assert score(answer, "5", "numerical") == score(answer, "0", "numerical") == 0.0
    assert score(answer, "5", "regression") == score(answer, "0", "regression") == 0.0


# WER by hand, S substitutions, D deletions, I insertions, N words of the reference:
#   "the cat sat" for "the cat sat down": D = 1, N = 4, 1 - 1/4 = 0.75
#   "a dog sat right down" for "the cat sat down": S = 2 (a, dog), I = 1 (right), 1 - 3/4 = 0.25
#   "x y z" for "a": S = 1, I = 2, N = 1: 1 - 3 < 0, so 0
@pytest.mark.parametrize(
    "answer, solution, expected",
    [
        pytest.param("the cat sat", "the cat sat down", 0.75, id="deletion"),
        pytest.param("a dog sat right down", "the cat sat down", 0.25, id="all-three-edits"),
        pytest.param("x y z", "a", 0.0, id="more-errors-than-words"),
        pytest.param("STOP here", "Stop here", 0.5, id="letter-case-kept"),
        pytest.param("Stop. here", "Stop here", 0.5, id="punctuation-kept"),
        pytest.param("no\nentry\t\u00a0here", "no entry here", 1.0, id="any-white-space"),
        pytest.param("禁止 通行", "禁止 入内", 0.5, id="chinese"),
        pytest.param("", "", 1.0, id="both-empty"),
        pytest.param("a", "<answer></answer>", 0.0, id="empty-reference"),
    ],
)
def test_ocr(answer, solution, expected):
    assert score(answer, solution, "OCR") == pytest.approx(expected, abs=1e-12)


# ROUGE F-measure by hand: 2 * matches / (units of the answer + units of the reference).
#   "the cat sat" for "the cat sat down": words 2*3/(3+4) = 6/7; pairs 2*2/(2+3) = 4/5; longest
#   common subsequence 3: 6/7. Mean (6/7 + 4/5 + 6/7) / 3 = 88/105.
#   "down sat cat the" for "the cat sat down": words 1, pairs 0, subsequence 1 word: 2*1/8 = 1/4.
#   Mean 5/12.
#   "cats running" for "cat runs": the stems cat, run are equal: 1.
#   "Cat!" for "cat": words 1, no pairs: 0, subsequence 1. Mean 2/3.
#   Four Chinese characters of which the first two agree: words 2*2/8, pairs 2*1/6, subsequence 1/2.
#   Mean (1/2 + 1/3 + 1/2) / 3 = 4/9.
@pytest.mark.parametrize(
    "answer, solution, expected",
    [
        pytest.param("the cat sat", "the cat sat down", 88 / 105, id="shorter"),
        pytest.param("down sat cat the", "the cat sat down", 5 / 12, id="reversed"),
        pytest.param("cats running", "cat runs", 1.0, id="stemmed"),
        pytest.param("The CAT, sat down!", "the cat sat down", 1.0, id="case-and-punctuation"),
        pytest.param("a dog", "the cat", 0.0, id="nothing-shared"),
        pytest.param("Cat!", "cat", 2 / 3, id="one-word-has-no-pairs"),
        pytest.param("向左移动", "向左转弯", 4 / 9, id="half-chinese"),
        pytest.param("Кот спит!", "кот спит", 1.0, id="cyrillic-case"),
        pytest.param("की री", "का रा", 0.0, id="hindi-vowel-signs-count"),
        pytest.param("it\u2019s a caf\u00e9", "It's a caf\u00e9.", 1.0, id="curly-quote"),
        pytest.param("\U0001f600", "\U0001f600", 0.0, id="emoji-are-no-words"),
        pytest.param("", "cat", 0.0, id="empty-answer"),
        pytest.param("cat", "", 0.0, id="empty-reference"),
    ],
)
def test_free_form(answer, solution, expected):
    assert score(answer, solution, "free-form") == pytest.approx(expected, abs=1e-12)


WORDS = ["the", "The", "cats", "running", "national", "it's", "y_1", "flies,", "gas", "ga"]
ENGLISH = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
ASCII = st.text(st.characters(max_codepoint=127), max_size=60)


@given(ENGLISH | ASCII, ENGLISH | ASCII)
def test_ascii_free_form_equals_the_official_reward(answer, reference):
    answer, reference = answer.strip(), reference.strip()
    official = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    parts = official.score(reference, answer).values()
    expected = sum(part.fmeasure for part in parts) / 3
    assert rewards._mean_rouge(answer, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "answer, solution, expected",
    [
        pytest.param("8", "10", 0.8, id="below"),
        pytest.param("12", "10", 0.8, id="above"),
        pytest.param("-8", "-10", 0.8, id="negative"),
        pytest.param("1,250", "1e3", 0.75, id="grammar-of-numerical"),
        pytest.param("25", "10", 0.0, id="error-above-one"),
        pytest.param("0.0", "0", 1.0, id="zero-for-zero"),
        pytest.param("0.001", "0", 0.0, id="nearly-zero-for-zero"),
        pytest.param("1e999", "10", 0.0, id="overflow"),
        pytest.param("1e308", "-1e308", 0.0, id="difference-overflows"),
        pytest.param("1e308", "5e-324", 0.0, id="ratio-overflows"),
        pytest.param("1e-999", "10", 0.0, id="underflow"),
    ],
)
def test_regression(answer, solution, expected):
    assert score(answer, solution, "regression") == pytest.approx(expected, abs=1e-12)


def test_the_bare_text_is_never_scored():
    for problem_type, solution in SOLUTIONS.items():
        for response in (solution, f"<answer>{solution}", f"<think>{solution}</think>", ""):
            assert accuracy_reward(response, solution, problem_type) == 0.0
    assert accuracy_reward("", "<answer></answer>", "OCR") == 0.0


def test_unknown_problem_type_names_itself_and_the_known_ones():
    for call in (lambda: score("B", "B", "video"), lambda: check_solution("B", "video")):
        with pytest.raises(ValueError) as error:
            call()
        assert all(name in str(error.value) for name in ("'video'", *TYPES))


@pytest.mark.parametrize(
    "solution, problem_type",
    [
        pytest.param("left", "multiple choice", id="choice-word"),
        pytest.param("<answer></answer>", "multiple choice", id="choice-empty"),
        pytest.param("12 m", "numerical", id="number-with-unit"),
        pytest.param("nan", "regression", id="nan"),
        pytest.param("1e999", "regression", id="not-finite"),
        pytest.param("<answer>5", "numerical", id="half-a-pair"),
    ],
)
def test_a_solution_that_nothing_can_match_is_an_error(solution, problem_type):
    with pytest.raises(ValueError) as error:
        check_solution(solution, problem_type)
    assert solution in str(error.value) and problem_type in str(error.value)
    assert score(solution, solution, problem_type) == 0.0  # the reward is total all the same


FRAGMENTS = [
    "<answer>", "</answer>", "<think>", "</think>", "B", "(", ")", "1", ",234", ".", "e9", "-",
    "nan", "\u0665", "\ud800", "\x00", "\n", " ", "cats", "\u732b", "\u0301",
]  # fmt: skip
ANY_CHARACTER = st.characters(exclude_categories=())  # hypothesis leaves surrogates out by default
ANY_TEXT = st.text(ANY_CHARACTER) | st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join)


@pytest.mark.parametrize("problem_type", TYPES)
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_every_response_has_a_reward(problem_type, text):
    for response in (text, f"<answer>{text}</answer>"):
        reward = accuracy_reward(response, SOLUTIONS[problem_type], problem_type)
        assert type(reward) is float and math.isfinite(reward) and 0.0 <= reward <= 1.0
        assert format_reward(response) in (0.0, 1.0)


# Nothing here measures time: a step that grows with the square of these lengths takes minutes,
# and the test run does not end.
ADVERSARIAL = {
    "openings": "<answer>" * 25_000,
    "line-breaks": "<think>a</think>" + "\n" * 200_000 + "<answer>b",
    "digits": "1" * 200_000 + "x",
    "groups": "1" + ",234" * 50_000 + "x",
    "exponent": "1e" + "9" * 200_000,
    "one-word": "y" * 20_000 + "ed",
    "marks": "e" + "\u0301" * 20_000,
    "words": " ".join(map(str, range(40_000))),
    "chinese": "\u732b" * 20_000,
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_long_texts_are_scored_in_linear_time(name):
    text = ADVERSARIAL[name]
    for response in (text, f"<answer>{text}</answer>"):
        assert format_reward(response) == 0.0
        for problem_type in TYPES:
            assert 0.0 <= accuracy_reward(response, SOLUTIONS[problem_type], problem_type) <= 1.0


def test_texts_are_compared_up_to_the_documented_length():
    same = "word " * rewards.MAX_ROUGE_WORDS
    assert score(same + "more", same, "free-form") == 1.0
    assert score("more " + same, same, "free-form") < 1.0
    line = "a" * (rewards.MAX_WER_CHARS - 2) + " "
    assert score(line + "b", line + "c", "OCR") == 0.5
    assert score(line + "bc", line + "bd", "OCR") == 1.0
