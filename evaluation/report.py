"""What is read from results: a benchmark on the console, the gap between two orders of frames, the
paired difference of two models, Table 1.

Scores and differences are in percent, with their 95% intervals over videos (scores.py).
"""

from pathlib import Path

from data import ORDERS
from evaluation.results import differences, read_records, read_summary, write_json
from evaluation.scores import BENCHMARKS, benchmark_of, gaps
from infra.errors import require

NUM_LISTED = 5  # unusable items on the console; the summary lists all


def percent(part: dict) -> str:
    """A score, or with its sign a difference, in percent, and its 95% interval."""
    sign, key = ("+", "difference") if "difference" in part else ("", "score")
    if part[key] is None:
        return "-"
    value, low, high = (f"{100 * x:{sign}.1f}" for x in (part[key], *part["interval"]))
    return f"{value} [{low}, {high}]"


def print_scores(found: dict, definitions: dict[str, str]) -> None:
    """Scores or paired differences: a line for each owner's overall one and for each group."""
    for owner, part in found["overall"].items():
        note = "; ".join(filter(None, (definitions.get(owner), part.get("note"))))
        if part.get("num_unpaired"):
            note += f"{'; ' * bool(note)}{part['num_unpaired']} usable on one side only left out"
        print(f"  {owner + chr(39) + 's score':18} {percent(part):22} over {part['n']} items of "
              f"{part['videos']} videos{': ' * bool(note)}{note}")  # fmt: skip
    for grouping, groups in found["by"].items():
        for group, part in groups.items():
            print(f"    {grouping:14} {group:28} {percent(part):22} {part['n']}")


def print_summary(summary: dict) -> None:
    """One benchmark: accuracy, both overall scores with intervals, its groups, unusable items."""
    accuracy = "-" if summary["accuracy"] is None else f"{100 * summary['accuracy']:.1f}"
    print(f"\n{summary['benchmark']}, {summary['order']} frames: accuracy {accuracy} over "
          f"{summary['n']} items")  # fmt: skip
    scores, unusable = summary["scores"], summary["unusable"]
    print_scores(scores["all_items"], scores["definitions"])
    if unusable:
        usable = scores["decodable_items"]["overall"]
        print(f"  {len(unusable)} items cannot be used and count 0; without them: benchmark "
              f"{percent(usable['benchmark'])}, paper {percent(usable['paper'])}")  # fmt: skip
        for item in unusable[:NUM_LISTED]:
            print(f"    row {item['row']} (problem {item['problem_id']}): {item['error']}")


def write_gaps(folder: Path, name: str, orders: list[str], quiet: bool = False) -> None:
    """What the order of frames is worth: <name>.gap.<order>.json for each order beside "ordered"
    where both have results of one model, data file and set of flags. Where they no longer do, the
    gap file of earlier results is deleted.

    orders: those that have just been evaluated; gaps between two others are left as they are.
    """
    ordered = read_summary(folder / f"{name}.ordered.summary.json")
    for order in ORDERS[1:]:
        if not {order, "ordered"} & set(orders):
            continue
        file = folder / f"{name}.gap.{order}.json"
        other = read_summary(folder / f"{name}.{order}.summary.json")
        expected = (ordered or {}).get("provenance", {}) | {"order": order}
        if not (ordered and other) or differences(expected, other.get("provenance", {})):
            if file.exists():
                file.unlink()
                print(f"{file} is deleted: its results have been replaced")
            continue
        pair = (read_records(folder / f"{name}.{which}.jsonl") for which in ("ordered", order))
        gap = gaps(name, *pair)
        write_json(file, {"model": ordered["model"], "order": order, "provenance": expected, **gap})
        if not quiet:
            print(f"\n{name}: ordered minus {order} frames")
            print_scores(gap, {})


def result_files(place: str) -> dict[str, Path]:
    """The results files that a name on the command line means, by <benchmark>.<order>."""
    path = Path(place)
    require(path.exists(), f"--compare {place} does not exist")
    found = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    found = [file for file in found if file.stem.rpartition(".")[2] in ORDERS]
    require(found, f"--compare {place}: no <benchmark>.<order>.jsonl of eval.py")
    files = {file.stem: file for file in found}
    several = f"--compare {place} holds several models: name the folder of one"
    require(len(files) == len(found), several)
    return files


def compare(a: str, b: str) -> None:
    """Print the paired differences, A minus B, of two results files or of all in two folders."""
    files_a, files_b = result_files(a), result_files(b)
    pairs = [(files_a[name], files_b[name]) for name in files_a if name in files_b]
    if Path(a).is_file() and Path(b).is_file():  # which may be of two orders
        pairs = [(Path(a), Path(b))]
    require(pairs, f"--compare: {a} and {b} have no benchmark and order in common")
    for pair in pairs:
        title = "{} minus {}".format(*pair)
        name, other = (path.stem.rpartition(".")[0] for path in pair)
        require(name == other, f"--compare, {title}: they are of two benchmarks")
        made = [read_summary(path.with_suffix(".summary.json")) for path in pair]
        changed = differences(*(one["provenance"] for one in made)) if all(made) else {}
        versions = f"--compare, {title}: they are of two versions of the data file {name}"
        require("data_sha256" not in changed, versions)
        print(f"\n{title}")
        print_scores(gaps(name, *map(read_records, pair)), {})
        for key in sorted(changed.keys() - {"model", "model_fingerprint"}):
            print("  they differ in {}: {!r:.60} and {!r:.60}".format(key, *changed[key]))


def print_table(folders: list[str]) -> None:
    """Table 1 from all summaries below some folders: the paper's scores over all items, in percent.

    A row is a model, a number of frames and, if it is not "ordered", their order. A star marks a
    score with unusable items in it. Files that are not of the six benchmarks are left out.

    Raises:
        UserError: two summaries belong in one cell, or none is of one of the six benchmarks.
    """
    files = {file for folder in folders for file in Path(folder).rglob("*.summary.json")}
    names = [name for name in BENCHMARKS if name != "generic"]
    rows: dict[tuple, dict[str, str]] = {}
    for summary in map(read_summary, sorted(files)):
        name = benchmark_of(summary.get("benchmark", ""))  # that of a judge has none
        if name == "generic":
            continue
        frames = summary["settings"]["max_frames"]
        label = summary["model"] + (f" ({summary['order']})" * (summary["order"] != "ordered"))
        cells = rows.setdefault((label, frames), {})
        require(name not in cells, f"two summaries of {name} for {label} with {frames} frames")
        star = "\\*" if summary["unusable"] else ""
        cells[name] = percent(summary["scores"]["all_items"]["overall"]["paper"]).split()[0] + star
    require(rows, f"--table: no summary of eval.py below {' '.join(folders)} is of one of "
            f"{', '.join(names)}")  # fmt: skip
    header = ["Model", "Frames", *(BENCHMARKS[name].column for name in names)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for (label, frames), cells in rows.items():
        lines.append([label, str(frames), *(cells.get(name, "-") for name in names)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(table + "\n\n\\* with unusable items, which count 0" * ("\\*" in table))
