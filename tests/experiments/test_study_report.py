"""experiments/report.py: statistics against printed tables and by hand, the words, the report."""

import json
import math
import sys

import pytest
from PIL import Image

from experiments import ablations, report
from experiments.arms import ARMS, PRIMARY
from experiments.records import CURVES
from experiments.report import Estimate, estimate, holm, power, t_quantile, word

# Two-sided 95% and 99% points of Student's t, from printed tables.
T_TABLE = {
    1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 5: (2.571, 4.032),
    10: (2.228, 3.169), 11: (2.201, 3.106), 15: (2.131, 2.947), 30: (2.042, 2.750),
}  # fmt: skip


@pytest.mark.parametrize("df", T_TABLE)
def test_quantiles_are_those_of_printed_tables(df):
    found = [t_quantile(coverage, df) for coverage in (0.95, 0.99)]
    assert found == pytest.approx(T_TABLE[df], abs=6e-4)


def test_an_interval_by_hand():
    found = estimate([1.0, 2.0, 3.0, 6.0])  # mean 3, sd sqrt(14 / 3), t_3 = 3.182
    half = 3.182 * math.sqrt(14 / 3) / 2
    assert (found.n, found.mean, found.sd) == (4, 3, pytest.approx(math.sqrt(14 / 3)))
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-3)
    assert found.p == pytest.approx(1 - report.t_coverage(3 / math.sqrt(14 / 12), 3))
    assert 0.05 < found.p < 0.1  # t = 2.777: below the 95% point, above the 90% point 2.353


def test_intervals_of_few_or_equal_values():
    assert estimate([4.0]).mean == 4 and math.isnan(estimate([4.0]).low)
    assert math.isnan(estimate([]).mean)
    assert estimate([2.0, 2.0]) == Estimate(2, 2.0, 2.0, 2.0, 0.0, 0.0)
    assert estimate([0.0, 0.0]).p == 1


def test_holm_by_hand():
    # 0.01 * 3; 0.02 * 2; 0.04 * 1 would be as much as the one before it
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.03, 0.02, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert holm([0.5, 0.4, 0.6]) == [1, 1, 1]


WORDS = {  # low, high, adjusted p
    "reaches 2": (0.5, 3.5, 0.01, "holds"),
    "all above 2": (2.5, 3.5, 0.01, "holds"),
    "ends at 2": (0.1, 2.0, 0.04, "holds"),
    "below 2": (0.1, 1.9, 0.04, "holds, small"),
    "not by Holm": (0.1, 3.9, 0.05, "open"),
    "small, not by Holm": (0.1, 1.9, 0.06, "open"),
    "from 0": (0.0, 1.9, 1.0, "fails"),
    "around 0": (-1.0, 1.0, 1.0, "fails"),
    "a harm": (-4.0, -1.0, 0.01, "fails"),
    "too wide": (-1.0, 2.0, 1.0, "open"),
}


@pytest.mark.parametrize("low, high, p, expected", WORDS.values(), ids=WORDS)
def test_the_decision_words(low, high, p, expected):
    found = Estimate(12, (low + high) / 2, low, high, 1.0, p)
    assert word(found, p, num_planned=12) == expected


def test_a_word_waits_for_all_pairs_and_bears_two_lost():
    ten = Estimate(10, 0.0, -1.0, 1.0, 1.0, 1.0)
    assert word(ten, 1.0, 12) == "unfinished: 10 of 12 pairs"
    assert word(ten, 1.0, 12, num_lost=2) == "fails"
    assert word(ten, 1.0, 13, num_lost=3) == "open"


def test_power_is_that_of_tables():
    """One-sample t, two-sided 5%: 12 pairs find an effect of 0.9 sd with power 0.80 (Cohen: 11.7
    for d = 0.9), and an effect of 0 sd in 2.5% of studies on one side."""
    assert power(2 / 0.9, 12) == pytest.approx(0.80, abs=0.02)
    assert power(2e6, 12) == pytest.approx(0.025, abs=0.005)
    assert power(1.0, 12) > power(1.0, 6) > power(2.0, 6)


# ----------------------------------------------------------------------------------------- reports

GAINS = {"tgrpo": 0.1, "tgrpo_none": 3.0, "tgrpo_advantage": 1.0, "grpo_cue25": 12.0}


def write_results(folder, skip=(), failed=()):
    """Made-up results of all arms: 60% on the items of the primary outcome and a gain by arm."""
    folder.mkdir()
    for arm, about in ARMS.items():
        for seed in range(about.num_seeds):
            if (arm, seed) in skip:
                continue
            noise = (0.3, -0.3, 0.1, -0.1)[seed % 4] if arm in GAINS else 0.0
            score = (60 + seed / 2 + GAINS.get(arm, 0.0) + noise) / 100
            part = {"n": 4, "score": score, "length": 12.0}
            kinds = dict.fromkeys(("all", "agrees", "absent", "disagrees", "image"), part)
            curve = {"step": [10, 20], **dict.fromkeys(CURVES, [0.1, 0.2])}
            if arm.startswith("grpo"):
                curve["temporal_effect"] = [None, None]
            error = "the loss is not finite" if (arm, seed) in failed else None
            record = {
                "arm": arm, "seed": seed, "flags": {}, "error": error, "seconds": 1,
                "protocol_sha256": "cafe", "commit": "beef", "versions": {"torch": "2"},
                "curves": curve if about.trains else {},
            }  # fmt: skip
            if not error:
                shuffled = {kind: part | {"score": 0.25} for kind in kinds}
                record["accuracy"] = {"ordered": kinds, "shuffled": shuffled}
            (folder / f"{arm}.seed_{seed}.json").write_text(json.dumps(record))
    return folder


def text_of(folder, *seeds):
    return report.report_text(report.Results(folder, seeds))


def row_of(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_a_report_says_what_the_results_say(tmp_path, monkeypatch, capsys):
    argv = ["ablations.py", "--report", "--results", str(write_results(tmp_path / "r"))]
    monkeypatch.setattr(sys, "argv", argv)
    ablations.main()
    text = (tmp_path / "r/report.md").read_text()
    assert text in capsys.readouterr().out and text == text_of(tmp_path / "r")
    rows = {claim: row_of(text, claim) for claim in PRIMARY}
    assert [row[6] for row in rows.values()] == ["**fails**", "**holds**", "**holds, small**"]
    values = [3.0 + (0.3, -0.3, 0.1, -0.1)[seed % 4] for seed in range(16)]
    one = estimate(values)
    _, second, _ = rows.values()
    assert second[3] == f"+{one.mean:.1f} [+{one.low:.1f}, +{one.high:.1f}]" and second[2] == "16"
    for words in ("sha256: cafe", "commit: beef", "are of another", "Failed runs: none", "+12.0"):
        assert words in text
    grpo = row_of(text, "grpo")
    assert grpo[6] == " ".join(f"{60 + seed / 2:.1f}" for seed in range(16))
    assert grpo[8:] == ["12.0", "-", "0.150"]  # tokens, temporal_effect, zero_std
    exploratory = text[text.index("| exploratory |") :]
    assert not {"holds", "fails", "open"} & set(exploratory.replace(",", " ").split())
    for name in ("differences", "kinds", "effect"):
        with Image.open(tmp_path / f"r/{name}.png") as image:
            assert len(set(image.convert("L").get_flattened_data())) > 50


def test_a_failed_run_is_named_and_takes_its_pair_along(tmp_path):
    folder = write_results(tmp_path / "r", failed=[("grpo", 3)])
    text = text_of(folder)
    found = row_of(text, "r_t helps, as printed (std)")
    assert found[2] == "15" and found[6] == "**fails**"
    assert "Failed runs: 1\n- grpo seed 3: the loss is not finite" in text


def test_an_unfinished_contrast_has_no_word(tmp_path):
    text = text_of(write_results(tmp_path / "r", skip=[("tgrpo_none", 11)]))
    assert row_of(text, "r_t helps without std")[6] == "**unfinished: 15 of 16 pairs**"


def test_nothing_is_decided_where_the_control_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(GAINS, "grpo_cue25", 8.0)
    text = text_of(write_results(tmp_path / "r"))
    decisions = {row_of(text, claim)[6] for claim in PRIMARY}
    assert decisions == {"**not decided: the control has failed**"}


def test_pilot_seeds_are_reported_only_where_they_are_named(tmp_path):
    folder = write_results(tmp_path / "r")
    for file in folder.glob("*grpo.seed_*.json"):
        record = json.loads(file.read_text())
        seed = record["seed"] + 100
        pilot = folder / f"{record['arm']}.seed_{seed}.json"
        pilot.write_text(json.dumps(record | {"seed": seed}))
    assert "pilot" not in text_of(folder)
    text = text_of(folder, 100, 101)
    found = row_of(text, "r_t helps, as printed (std)")
    assert "of the pilot" in text and found[6] == "**unfinished: 2 of 16 pairs**"


def test_few_results_are_reported_too(tmp_path):
    only = [(arm, seed) for arm in ARMS for seed in range(16) if (arm, seed) != ("tgrpo", 0)]
    text = text_of(write_results(tmp_path / "r", skip=only))
    assert row_of(text, "tgrpo")[2] == "60.4"
    with pytest.raises(SystemExit, match="no result"):
        text_of(tmp_path / "r", 100)
