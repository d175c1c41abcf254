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


def percent(part: dict, key: str = "score") -> str:
    """A score, or with its sign a difference, in percent, and its 95% interval."""
    if part[key] is None:
        return "-"
    sign = "+" if key == "difference" else ""
    low, high = part["interval"]
    return f"{100 * part[key]:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def print_groups(by: dict, key: str = "score") -> None:
    """A line for each group of each grouping."""
    for grouping, groups in by.items():
        for group, part in groups.items():
            print(f"    {grouping:14} {group:28} {percent(part, key):22} {part['n']}")


def print_summary(summary: dict) -> None:
    """One benchmark: accuracy, both overall scores with intervals, its groups, unusable items."""
    parts = [f"{kind} {100 * part['score']:.1f} ({part['n']})"
             for kind, part in summary["by_type"].items()]  # fmt: skip
    accuracy = "-" if summary["accuracy"] is None else f"{100 * summary['accuracy']:.1f}"
    print(f"\n{summary['benchmark']}, {summary['order']} frames: accuracy {accuracy} over "
          f"{summary['n']} items; by type: {', '.join(parts)}")  # fmt: skip
    scores = summary["scores"]
    for owner, part in scores["all_items"]["overall"].items():
        print(f"  {owner + chr(39) + 's score':18} {percent(part):22} over {part['n']} items of "
              f"{part['videos']} videos: {scores['definitions'][owner]}")  # fmt: skip
        if part.get("groups_missing"):
            print(f"    without {', '.join(part['groups_missing'])}, of which there is no item")
        if part.get("groups_unknown"):
            print(f"    no mean of groups: {part['groups_unknown']}")
    print_groups(scores["all_items"]["by"])
    unusable, usable = scores["unusable"], scores["decodable_items"]["overall"]
    if unusable["n"]:
        print(f"  {unusable['n']} items cannot be used and count 0; without them: benchmark "
              f"{percent(usable['benchmark'])}, paper {percent(usable['paper'])}")  # fmt: skip
        for reason, count in unusable["reasons"].items():
            print(f"    {count} x {reason}")
        for item in unusable["items"][:NUM_LISTED]:
            print(f"    row {item['row']} (problem {item['problem_id']}): {item['error']}")
        if unusable["n"] > NUM_LISTED:
            print(f"    and {unusable['n'] - NUM_LISTED} more, which the summary lists")


def print_differences(title: str, gap: dict) -> None:
    """Paired differences with their intervals: overall under both definitions, and by group."""
    print(f"\n{title}")
    for owner, part in gap["overall"].items():
        alone = part["only_a"] + part["only_b"]
        left = f", {alone} usable on one side only left out" if alone else ""
        print(f"  {owner + chr(39) + 's score':18} {percent(part, 'difference'):22} over "
              f"{part['n']} items{left}")  # fmt: skip
    print_groups(gap["by"], "difference")


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
        is_pair = ordered is not None and other is not None
        if not is_pair or differences(expected, other.get("provenance", {})):
            if file.exists():
                file.unlink()
                print(f"{file} is deleted: its results have been replaced")
            continue
        pair = (read_records(folder / f"{name}.{which}.jsonl") for which in ("ordered", order))
        gap = gaps(name, *pair)
        about = {"model": ordered["model"], "order": order, "provenance": expected}
        write_json(file, about | gap)
        if not quiet:
            print_differences(f"{name}: ordered minus {order} frames", gap)


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
    for path_a, path_b in pairs:
        name, other = (path.stem.rpartition(".")[0] for path in (path_a, path_b))
        require(name == other, f"--compare: {path_a} and {path_b} are of two benchmarks")
        old, new = (
            (read_summary(path.with_suffix(".summary.json")) or {}).get("provenance", {})
            for path in (path_a, path_b)
        )
        changed = differences(old, new) if old and new else {}
        require("data_sha256" not in changed, f"--compare: {path_a} and {path_b} are of two "
                f"versions of the data file {name}")  # fmt: skip
        gap = gaps(name, read_records(path_a), read_records(path_b))
        print_differences(f"{path_a} minus {path_b}", gap)
        for key, values in changed.items():
            if key not in ("model", "model_fingerprint"):
                print("  they differ in {}: {!r:.60} and {!r:.60}".format(key, *values))


def print_table(folders: list[str]) -> None:
    """The paper's Table 1 from all summaries below some folders: the paper's scores over all items,
    in percent.

    A row is a model, a number of frames and, if it is not "ordered", their order. A star marks a
    score with unusable items in it. Files that are not of the six benchmarks are left out.

    Raises:
        UserError: two summaries belong in one cell, or none is of one of the six benchmarks.
    """
    for folder in folders:
        require(Path(folder).is_dir(), f"--table {folder} is no folder")
    files = {file for folder in folders for file in Path(folder).rglob("*.summary.json")}
    summaries = [read_summary(file) for file in sorted(files)]
    summaries = [summary for summary in summaries if "scores" in summary]
    require(summaries, f"--table: no summary of eval.py below {', '.join(folders)}")
    print(markdown_table(summaries), end="")


def markdown_table(summaries: list[dict]) -> str:
    """print_table's Markdown."""
    names = [name for name in BENCHMARKS if name != "generic"]
    rows: dict[tuple, dict[str, str]] = {}
    notes = []
    for summary in summaries:
        name, scores = benchmark_of(summary["benchmark"]), summary["scores"]
        if name == "generic":
            continue
        frames, order = summary["settings"]["max_frames"], summary["order"]
        label = summary["model"] + ("" if order == "ordered" else f" ({order})")
        cells = rows.setdefault((label, frames), {})
        require(name not in cells, f"two summaries of {name} for {label} with {frames} frames")
        paper = scores["all_items"]["overall"]["paper"]
        cells[name] = "-" if paper["score"] is None else f"{100 * paper['score']:.1f}"
        if scores["unusable"]["n"]:
            cells[name] += "\\*"
            notes.append(f"\\* {label}, {frames} frames, {BENCHMARKS[name].column}: "
                         f"{scores['unusable']['n']} of {paper['n']} items are unusable "
                         "and count 0")  # fmt: skip
    found = ", ".join(sorted({summary["benchmark"] for summary in summaries}))
    require(rows, f"no summary is of one of {', '.join(names)}, but of {found}")
    header = ["Model", "Frames", *(BENCHMARKS[name].column for name in names)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for (label, frames), cells in rows.items():
        lines.append([label, str(frames), *(cells.get(name, "-") for name in names)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *notes]) + "\n"
