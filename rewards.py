"""Rule-based rewards of Section 3.1 ("Data Type and Rule-based Reward Design"): text to floats.

    problem type     the paper's rule              exactly, here
    ---------------  ----------------------------  ----------------------------------------------
    multiple choice  the answer matches            1 if the option letters are equal, else 0
    numerical        the number matches exactly    1 if equal as exact decimals, else 0
    OCR              Word Error Rate               max(0, 1 - WER), letter case counts
    free-form        average of ROUGE-1, -2, -L    mean F-measure, words lower-cased and stemmed
    regression       one minus relative error      1 - |p - g| / |g|, clipped to [0, 1]

Every function takes any response (empty, huge, malformed) and returns a defined value in time
linear in its length. A response without a complete answer pair scores 0. Solutions that no answer
can match are found before training, by `check_solution`. Departures from the official code are
marked "Official code:" where they occur.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

import jiwer
from nltk.stem.porter import PorterStemmer  # comes with rouge-score, which stems with it
from rouge_score import rouge_scorer, tokenizers

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# WER and ROUGE-L take quadratic time, so both texts are truncated: WER reads MAX_WER_CHARS (at most
# 10,000 words: 0.01 s), ROUGE reads MAX_ROUGE_WORDS (its table is pure Python; 512 words: 0.05 s;
# 4000: 2 s). A response has at most 768 tokens (App. D), its reasoning included, so its answer is
# hardly ever longer.
MAX_WER_CHARS = 20_000
MAX_ROUGE_WORDS = 512
MAX_STEM_LETTERS = 64  # no English word is longer; old nltk recurses per "y" of a run

CHOICE = re.compile(r"\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])(?=[.):]|\Z)")

# sign, integer part (commas between groups of three or none), fraction, exponent. ASCII only.
# 18 digits of exponent fit an int64.
NUMBER = re.compile(
    r"([+-]?)(?=\.?[0-9])([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]*))?"
    r"(?:[eE]([+-]?[0-9]{1,18}))?"
)


def extract_answer(response: str) -> str | None:
    """Text of the last complete <answer>..</answer> pair, stripped; None if there is none.

    The pair runs from the last <answer> that is closed to the first </answer> after it: of nested
    pairs the innermost counts. Official code: the first pair, and "" for none.

    >>> extract_answer("<answer>A</answer> no: <answer> B </answer> or <answer>C")
    'B'
    """
    start = response.rfind("<answer>", 0, max(response.rfind("</answer>"), 0))
    if start < 0:
        return None
    start += len("<answer>")
    return response[start : response.find("</answer>", start)].strip()


def format_reward(response: str) -> float:
    """1.0 iff the stripped response is <think>..</think><answer>..</answer>, else 0.0.

    White space may separate the two; each tag must appear exactly once. Section 3.2: r_i is
    correctness reward plus format reward.

    >>> format_reward("<think>It turns left.</think><answer>B</answer>")
    1.0
    """
    text = response.strip()
    if any(text.count(tag) != 1 for tag in TAGS):
        return 0.0
    thought, _, rest = text.partition("</think>")
    ordered = thought.startswith("<think>") and rest.lstrip().startswith("<answer>")
    return float(ordered and rest.endswith("</answer>"))


def accuracy_reward(response: str, solution: str, problem_type: str) -> float:
    """Correctness reward in [0, 1] of a response by the rule of its problem type (table above).

    Args:
        response: the model's full text; only its last answer pair is scored.
        solution: the reference, "<answer>B</answer>" or just "B".
        problem_type: one of the five names, in any letter case.
    Returns:
        0 also where the solution itself cannot be scored: check_solution finds such rows.
    Raises:
        ValueError: the problem type is unknown.

    >>> accuracy_reward("<think>..</think><answer>(b)</answer>", "B", "Multiple Choice")
    1.0
    >>> accuracy_reward("<answer>8</answer>", "10", "regression")
    0.8
    """
    rule = _rule(problem_type)
    answer, reference = extract_answer(response), _reference(rule, solution)
    answer = None if answer is None else rule.parse(answer)
    return 0.0 if answer is None or reference is None else rule.score(answer, reference)


def check_solution(solution: str, problem_type: str) -> None:
    """Raise ValueError if the type is unknown or no answer could ever match the solution.

    Such a row would give every response 0, which looks like a model that fails.
    """
    rule = _rule(problem_type)
    if _reference(rule, solution) is None:
        raise ValueError(
            f"a {problem_type} solution must be {rule.needs}, this is {solution!r:.200}"
        )


def parse_choice(text: str) -> str | None:
    """The option letter that a text starts with, in upper case, or None.

    One ASCII letter in () or [], or one followed by the end or one of ".):". The rest is not
    searched: "Both A and B" names no option. Official code: equality of the full texts.

    >>> [parse_choice(text) for text in ("B", "b.", "(b)", "B) left", "A or B", "AB", "Bat")]
    ['B', 'B', 'B', 'B', None, None, None]
    """
    match = CHOICE.match(text.strip())
    return match and match[match.lastindex].upper()


def parse_decimal(text: str) -> tuple[int, str, int] | None:
    """(sign, digits, exponent) with value sign * digits * 10**exponent, or None for no number.

    Equal numbers have equal triples (digits without zeros at either end; 0 is (0, "0", 0)), so
    the comparison is exact and "1e999999999" is cheap. "5." and ".5" are numbers; "1_000", "nan",
    "50%", "12 m" and digits of other scripts are not.

    >>> parse_decimal("-1,234.50e-3"), parse_decimal("1e3") == parse_decimal("1000.0")
    ((-1, '12345', -4), True)
    """
    match = NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    sign, whole, fraction, exponent = (group or "" for group in match.groups())
    digits = (whole.replace(",", "") + fraction).lstrip("0")
    significant = digits.rstrip("0")
    if not significant:
        return 0, "0", 0
    shift = len(digits) - len(significant) - len(fraction)
    return -1 if sign == "-" else 1, significant, int(exponent or 0) + shift


def parse_float(text: str) -> float | None:
    """A number of parse_decimal's grammar as a float; None if it is none or overflows.

    >>> parse_float("1,250.5"), parse_float("1e999"), parse_float("12 m")
    (1250.5, None, None)
    """
    decimal = parse_decimal(text)
    if decimal is None:
        return None
    sign, digits, exponent = decimal
    magnitude = float(f"{digits}e{exponent}")
    return None if magnitude == float("inf") else sign * magnitude


def _equality(answer: Any, reference: Any) -> float:
    """The paper: "exactly matches". Official code: rounds numbers to two decimals, and calls them
    different if only one of the texts has a point or a comma."""
    return float(answer == reference)


def _one_minus_wer(answer: list[str], reference: list[str]) -> float:
    """Any white space separates words, as in the official code; jiwer itself splits at blanks."""
    if not reference:  # WER divides by its number of words; older jiwer raises
        return float(not answer)
    return max(0.0, 1.0 - jiwer.wer(" ".join(reference), " ".join(answer)))


def _mean_rouge(answer: str, reference: str) -> float:
    """Two equal texts of one word score 2/3: they have no bigram for ROUGE-2."""
    scores = _rouge_scorer().score(reference, answer)
    return sum(score.fmeasure for score in scores.values()) / len(scores)


def _one_minus_relative_error(answer: float, reference: float) -> float:
    """A reference of 0 requires a 0. Official code: adds 1e-9 to numerator and denominator."""
    if reference == 0:
        return float(answer == 0)
    return max(0.0, 1.0 - abs(answer - reference) / abs(reference))


class _Tokenizer(tokenizers.Tokenizer):
    """rouge-score's default tokenizer, with stemming, for every script.

    On ASCII text the two agree token for token. Official code: the default, which drops everything
    but a-z and digits, so that any two Chinese texts score 0. Here a word consists of letters,
    marks and digits of any script, and each wide character (Chinese, Japanese, Korean) is a word of
    its own, since these are written without blanks.
    """

    def __init__(self) -> None:
        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        words = "".join(map(self._separate, text.lower())).split()[:MAX_ROUGE_WORDS]
        return [self._stemmer.stem(w) if 3 < len(w) <= MAX_STEM_LETTERS else w for w in words]

    @staticmethod
    def _separate(char: str) -> str:
        if unicodedata.category(char)[0] not in "LMN":  # letter, mark, number
            return " "
        return f" {char} " if unicodedata.east_asian_width(char) == "W" else char


@functools.cache
def _rouge_scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Tokenizer())


class _Rule(NamedTuple):
    parse: Callable[[str], Any]  # text to what is compared; None: not an answer of this type
    score: Callable[[Any, Any], float]  # (answer, reference), both parsed
    needs: str  # what a solution must be, for the message to the user


_RULES = {
    "multiple choice": _Rule(parse_choice, _equality, "one option letter"),
    "numerical": _Rule(parse_decimal, _equality, "a number"),
    "OCR": _Rule(lambda text: text[:MAX_WER_CHARS].split(), _one_minus_wer, "a text"),
    "free-form": _Rule(str, _mean_rouge, "a text"),
    "regression": _Rule(parse_float, _one_minus_relative_error, "a finite number"),
}
_RULES_BY_LOWER_NAME = {name.lower(): rule for name, rule in _RULES.items()}


def _rule(problem_type: str) -> _Rule:
    rule = _RULES_BY_LOWER_NAME.get(problem_type.strip().lower())
    if rule is None:
        known = ", ".join(_RULES)
        raise ValueError(f"unknown problem type {problem_type!r}: it must be one of {known}")
    return rule


def _reference(rule: _Rule, solution: str) -> Any:
    """A solution, with or without tags, parsed; None: nothing can match it."""
    tagged = extract_answer(solution)
    return rule.parse(solution.strip() if tagged is None else tagged)
