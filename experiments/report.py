"""What PROTOCOL.md promises of the results: paired differences, decision words, a table, figures.

Accuracies, their differences and standard deviations are in percentage points; intervals are 95%
t-intervals over seeds.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

try:
    import matplotlib
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    sys.exit(f"error: the report's figures need matplotlib ({error}): pip install matplotlib")

from experiments.arms import (
    ARMS,
    CONTROL,
    EXPLORATORY,
    FIRST_PILOT,
    NEEDED,
    PRIMARY,
    SMALLEST,
)
from experiments.records import about

KINDS = ("disagrees", "agrees", "absent", "image")  # of items; the first: primary outcome
MOST_LOST = 2  # pairs that a contrast can lose to failed runs and still be decided
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}  # fmt: skip


# -------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds with its interval. sd: sample standard deviation. p: two-sided, of the
    t-test that the mean is 0. nan where n is too small."""

    n: int
    mean: float
    low: float
    high: float
    sd: float
    p: float


def t_coverage(t: float, df: int) -> float:
    """P(|T| < t) of Student's t with df degrees of freedom (Abramowitz and Stegun 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(df))
    term = math.cos(angle) if df % 2 else 1.0
    total = 0.0 if df == 1 else term
    for k in range(2 + df % 2, df - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if df % 2:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def t_quantile(coverage: float, df: int) -> float:
    """The t with P(|T| < t) = coverage, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_coverage(middle, df) < coverage else (low, middle)
    return high


def estimate(values: list[float], coverage: float = 0.95) -> Estimate:
    """Mean and t-interval of independent values, such as the differences of pairs."""
    n = len(values)
    if n < 2:
        return Estimate(n, fmean(values) if n else math.nan, *[math.nan] * 4)
    mean, sd = fmean(values), stdev(values)
    half = t_quantile(coverage, n - 1) * sd / math.sqrt(n)
    if sd == 0:
        return Estimate(n, mean, mean, mean, sd, float(mean == 0))
    p = 1 - t_coverage(abs(mean) / sd * math.sqrt(n), n - 1)
    return Estimate(n, mean, mean - half, mean + half, sd, p)


def holm(ps: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order of ps."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = largest
    return adjusted


def word(found: Estimate, adjusted_p: float, num_planned: int, num_lost: int = 0) -> str:
    """The decision of PROTOCOL.md. num_lost: pairs of which a run has failed."""
    if found.n + num_lost < num_planned:
        return f"unfinished: {found.n} of {num_planned} pairs"
    if num_lost > MOST_LOST:
        return "open"
    if found.low > 0:
        if adjusted_p >= 0.05:
            return "open"
        return "holds" if found.high >= SMALLEST else "holds, small"
    return "fails" if found.high < SMALLEST else "open"


def power(sd: float, n: int, coverage: float = 0.95, num_draws: int = 20_000) -> float:
    """Share of studies with n pairs whose interval lies above 0 where the true difference is
    SMALLEST and differences are normal with this standard deviation. By symmetry also the share
    whose interval lies below SMALLEST where there is no difference."""
    draws = np.random.default_rng(0).normal(SMALLEST, sd, (num_draws, n))
    half = t_quantile(coverage, n - 1) * draws.std(-1, ddof=1) / math.sqrt(n)
    return float((draws.mean(-1) > half).mean())


# --------------------------------------------------------------------------------------- the table


class Results:
    """The records of a results folder: of the protocol's seeds, or of the given ones."""

    def __init__(self, folder: Path, seeds: list[int]):
        records = [json.loads(file.read_text(encoding="utf-8"))
                   for file in sorted(folder.glob("*.seed_*.json"))]  # fmt: skip
        self.records = {
            (one["arm"], one["seed"]): one for one in records
            if one["seed"] in (seeds or range(ARMS[one["arm"]].num_seeds))
        }  # fmt: skip
        if not self.records:
            sys.exit(f"error: {folder} holds no result of these seeds")
        kinds = {kind for one in self.records.values() if not one["error"]
                 for kind in one["accuracy"]["ordered"]}  # fmt: skip
        self.kinds = [kind for kind in KINDS if kind in kinds] or ["all"]  # of real data: all items
        self.primary = self.kinds[0]
        self.arms = [arm for arm in ARMS if self.finished(arm)]

    def finished(self, arm: str) -> dict[int, dict]:
        """Seed to record, of the runs that did not fail."""
        return {seed: one for (name, seed), one in sorted(self.records.items())
                if name == arm and not one["error"]}  # fmt: skip

    def failed(self) -> list[dict]:
        return [one for one in self.records.values() if one["error"]]

    def scores(self, arm: str, kind: str = "", order: str = "ordered") -> dict[int, float]:
        """Seed to accuracy; of the primary outcome unless a kind of item is named."""
        return {seed: 100 * one["accuracy"][order][kind or self.primary]["score"]
                for seed, one in self.finished(arm).items()}  # fmt: skip

    def differences(self, pair: tuple[str, str]) -> list[float]:
        """Of the primary outcome, one for each seed that both arms have."""
        a, b = map(self.scores, pair)
        return [a[seed] - b[seed] for seed in a if seed in b]

    def num_lost(self, pair: tuple[str, str]) -> int:
        """Pairs of which a run has failed."""
        return len({one["seed"] for one in self.failed() if one["arm"] in pair})


def text_of(found: Estimate, sign: str = "") -> str:
    if math.isnan(found.low):
        return "-" if math.isnan(found.mean) else f"{found.mean:{sign}.1f}"
    return f"{found.mean:{sign}.1f} [{found.low:{sign}.1f}, {found.high:{sign}.1f}]"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def arms_table(results: Results) -> str:
    """Each arm: accuracy by kind of item, each seed's point, and the secondary outcomes."""
    header = ["arm", "seeds", *results.kinds, f"{results.primary}, each seed",
              "ordered minus shuffled", "tokens", "temporal_effect", "zero_std"]  # fmt: skip
    rows = []
    for arm in results.arms:
        records = results.finished(arm).values()
        by_kind = [estimate(list(results.scores(arm, kind).values())) for kind in results.kinds]
        shuffled = results.scores(arm, order="shuffled")
        gaps = [score - shuffled[seed] for seed, score in results.scores(arm).items()]
        tokens = [one["accuracy"]["ordered"][results.primary]["length"] for one in records]
        row = [arm, str(len(records)), *map(text_of, by_kind),
               " ".join(f"{score:.1f}" for score in results.scores(arm).values()),
               text_of(estimate(gaps), "+"), f"{fmean(tokens):.1f}"]  # fmt: skip
        for key in ("temporal_effect", "zero_std"):  # over all steps
            values = [value for one in records for value in one["curves"].get(key, [])
                      if value is not None]  # fmt: skip
            row.append(f"{fmean(values):.3f}" if values else "-")
        rows.append(row)
    return table(header, rows)


def primary_table(results: Results, control: Estimate) -> str:
    """The primary contrasts and their words. Without the control's effect no claim is decided."""
    found = {claim: estimate(results.differences(pair)) for claim, pair in PRIMARY.items()}
    adjusted = holm([1.0 if math.isnan(one.p) else one.p for one in found.values()])
    rows = []
    for (claim, one), p in zip(found.items(), adjusted, strict=True):
        pair = PRIMARY[claim]
        planned = min(ARMS[arm].num_seeds for arm in pair)
        decision = word(one, p, planned, results.num_lost(pair))
        if control.mean < NEEDED:
            decision = "not decided: the control has failed"
        powers = [f"{power(one.sd, n):.2f} / {power(one.sd, n, 1 - 0.05 / 3):.2f}"
                  if one.sd > 0 else "-" for n in (12, 16)]  # fmt: skip
        rows.append([claim, " - ".join(pair), str(one.n), text_of(one, "+"), f"{one.p:.4f}",
                     f"{p:.4f}", f"**{decision}**", f"{one.sd:.2f}", *powers])  # fmt: skip
    return table(["claim", "arms", "pairs", "difference [95%]", "p", "p, Holm", "decision", "sd",
                  "power, 12 pairs", "power, 16 pairs"], rows)  # fmt: skip


def exploratory_table(results: Results) -> str:
    rows = [[what, " - ".join(pair), str(one.n), text_of(one, "+")]
            for what, pair in EXPLORATORY.items()
            for one in [estimate(results.differences(pair))] if one.n]  # fmt: skip
    return table(["exploratory", "arms", "pairs", "difference [95%]"], rows)


def report_text(results: Results) -> str:
    records, now = results.records.values(), about()["protocol_sha256"]
    made = {key: sorted({str(one[key]) for one in records})
            for key in ("protocol_sha256", "commit", "versions")}  # fmt: skip
    changed = " (**the results are of another**)" * (made["protocol_sha256"] != [now])
    is_pilot = any(seed >= FIRST_PILOT for _, seed in results.records)
    control = estimate(results.differences(CONTROL))
    failed = [f"- {one['arm']} seed {one['seed']}: {one['error']}" for one in results.failed()]
    parts = [
        "# Report" + " of the pilot: not to be published" * is_pilot,
        f"PROTOCOL.md: SHA-256 {now}{changed}. Results made under:",
        "\n".join(f"- {key}: {', '.join(values)}" for key, values in made.items()),
        f"Primary outcome: accuracy in percent on the items *{results.primary}*. Brackets: 95% "
        "t-intervals over seeds. Power: chance to find a true difference of 2 points, alone / as "
        "the first of three by Holm, with the sd of these differences.",
        primary_table(results, control),
        f"Positive control, {' - '.join(CONTROL)}: {text_of(control, '+')} over {control.n} pairs; "
        f"{NEEDED:g} needed.",
        arms_table(results),
        exploratory_table(results),
        "\n".join([f"Failed runs: {len(failed) or 'none'}", *failed]),
    ]  # fmt: skip
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


# ----------------------------------------------------------------------------------------- figures


def draw_differences(results: Results) -> Figure:
    """Each seed's paired difference of the primary contrasts, their mean and interval."""
    figure = Figure((6.4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(0, SMALLEST, color=COLOURS[4], alpha=0.15, label="0 to 2 points")
    axes.axvline(0, color="black", linewidth=0.8)
    labels = []
    for place, (claim, pair) in enumerate(PRIMARY.items()):
        values = results.differences(pair)
        one = estimate(values)
        labels.append(f"{claim}\n{' - '.join(pair)}, {one.n} seeds")
        axes.plot(values, [place + 0.15] * one.n, "o", color=COLOURS[0], alpha=0.4, markersize=4)
        if not math.isnan(one.low):
            axes.errorbar(one.mean, place, xerr=one.high - one.mean, fmt="D", color=COLOURS[1],
                          capsize=3)  # fmt: skip
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"difference of accuracy on the items {results.primary}, points\n"
                    "circles: seeds; diamonds: mean and 95% t-interval over seeds")  # fmt: skip
    axes.legend()
    return figure


def draw_kinds(results: Results) -> Figure:
    """Accuracy of each arm by kind of item."""
    arms = results.arms
    figure = Figure((1.5 + 0.55 * len(arms), 3.8), layout="constrained")
    axes = figure.add_subplot()
    for number, kind in enumerate(results.kinds):
        found = [estimate(list(results.scores(arm, kind).values())) for arm in arms]
        places = [place + 0.12 * (number - len(results.kinds) / 2) for place in range(len(arms))]
        halves = [0 if math.isnan(one.low) else one.high - one.mean for one in found]
        axes.errorbar(places, [one.mean for one in found], yerr=halves, fmt="o", capsize=2,
                      markersize=4, color=COLOURS[number], label=kind)  # fmt: skip
    names = [f"{arm} ({len(results.finished(arm))})" for arm in arms]
    axes.set_xticks(range(len(arms)), names, rotation=60, ha="right")
    axes.set_ylabel("accuracy, percent")
    axes.set_xlabel("arm (number of seeds); mean and 95% t-interval over seeds")
    figure.legend(loc="outside upper center", ncols=len(results.kinds))
    return figure


def draw_curves(results: Results, key: str = "temporal_effect") -> Figure:
    """A metric over training, the mean over seeds of each arm that has it, with its interval."""
    figure = Figure((6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    number = 0
    for arm in results.arms:
        curves = [one["curves"] for one in results.finished(arm).values() if one["curves"]]
        if not curves or None in curves[0][key]:
            continue
        points = [estimate(list(values)) for values in zip(*(one[key] for one in curves),
                                                           strict=True)]  # fmt: skip
        style = {"color": COLOURS[number % 7], "linestyle": ("-", "--", ":")[number // 7 % 3]}
        steps, number = curves[0]["step"], number + 1
        axes.plot(steps, [one.mean for one in points], label=f"{arm} ({len(curves)})", **style)
        axes.fill_between(steps, [one.low for one in points], [one.high for one in points],
                          color=style["color"], alpha=0.15, linewidth=0)  # fmt: skip
    axes.set_xlabel("optimizer step; mean of a twentieth of the run")
    axes.set_ylabel(f"{key}, mean change of |A_i|" if key == "temporal_effect" else key)
    figure.legend(loc="outside right upper", title="arm (seeds), mean\nand 95% t-interval")
    return figure


def write_report(folder: Path, seeds: list[int]) -> None:
    """report.md and three figures into the results folder; the text on the console too."""
    results = Results(folder, seeds)
    text = report_text(results)
    print(text)
    (folder / "report.md").write_text(text, encoding="utf-8")
    figures = {"differences": draw_differences, "kinds": draw_kinds, "effect": draw_curves}
    with matplotlib.rc_context(STYLE):
        for name, draw in figures.items():
            draw(results).savefig(folder / f"{name}.png", dpi=120)
