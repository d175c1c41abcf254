"""What is read from results: a benchmark on the console, the gap between two orders of frames, the
paired difference of two models, Table 1.

Scores and differences are in percent, with their 95% intervals over clips (scores.py).
"""

from pathlib import Path

from data import ORDERS
from evaluation.results import differences, read_records, read_summary, write_json
from evaluation.scores import gaps, markdown_table
from infra.errors import require

NUM_LISTED = 5  # unusable items on the console; the summary lists all


def percent(part: dict, key: str = "score") -> str:
    """A score, or with its sign a difference, in percent, and its 95% interval."""
    if part[key] is None:
        return "-"
    sign = "+" if key == "difference" else ""
    low, high = part["interval"]
    return f"{100 * part[key]:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def print_summary(summary: dict) -> None:
    """One benchmark: accuracy, both overall scores with intervals, its groups, what is unusable."""
    parts = [f"{kind} {100 * part['score']:.1f} ({part['n']})"
             for kind, part in summary["by_type"].items()]  # fmt: skip
    accuracy = "-" if summary["accuracy"] is None else f"{100 * summary['accuracy']:.1f}"
    print(f"\n{summary['benchmark']}, {summary['order']} frames: accuracy {accuracy} over "
          f"{summary['n']} items; by type: {', '.join(parts)}")  # fmt: skip
    scores = summary["scores"]
    everything, shown = scores["all_items"], scores["decodable_items"]
    for owner, part in everything["overall"].items():
        print(f"  {owner + chr(39) + 's score':18} {percent(part):22} over {part['n']} items of "
              f"{part['clips']} clips: {scores['definitions'][owner]}")  # fmt: skip
        if part.get("groups_missing"):
            print(f"    without {', '.join(part['groups_missing'])}, of which there is no item")
    for grouping, groups in everything["by"].items():
        for group, part in groups.items():
            print(f"    {grouping:14} {group:28} {percent(part):22} {part['n']}")
    print_unusable(summary["unusable"], scores["unusable"]["reasons"], shown["overall"])


def print_unusable(unusable: list[dict], reasons: dict[str, int], shown: dict) -> None:
    """How many items cannot be used and why, the first of them, and the scores without them."""
    if not unusable:
        return
    print(f"  {len(unusable)} items cannot be used and count 0; without them: "
          f"benchmark {percent(shown['benchmark'])}, paper {percent(shown['paper'])}")  # fmt: skip
    for reason, count in reasons.items():
        print(f"    {count} x {reason}")
    for item in unusable[:NUM_LISTED]:
        print(f"    row {item['row']} (problem {item['problem_id']}): {item['error']}")
    if len(unusable) > NUM_LISTED:
        print(f"    and {len(unusable) - NUM_LISTED} more, which the summary lists")


def print_differences(title: str, gap: dict) -> None:
    """Paired differences with their intervals: overall under both definitions, and by group."""
    print(f"\n{title}")
    for owner, part in gap["overall"].items():
        alone = part["only_a"] + part["only_b"]
        left = f", {alone} on one side alone left out" if alone else ""
        print(f"  {owner + chr(39) + 's score':18} {percent(part, 'difference'):22} over "
              f"{part['n']} items{left}")  # fmt: skip
    for grouping, groups in gap["by"].items():
        for group, part in groups.items():
            print(f"    {grouping:14} {group:28} {percent(part, 'difference'):22} {part['n']}")


def write_gaps(folder: Path, name: str, orders: list[str], quiet: bool = False) -> None:
    """What the order of frames is worth: <name>.gap.<order>.json for each order beside "ordered",
    where both are finished in the folder with one model, data file and set of flags.

    orders: those that have just been evaluated; gaps between two others are left as they are.
    """
    ordered = read_summary(folder / f"{name}.ordered.summary.json")
    for order in ORDERS[1:]:
        other = read_summary(folder / f"{name}.{order}.summary.json")
        if ordered is None or other is None or not {order, "ordered"} & set(orders):
            continue
        expected = ordered.get("provenance", {}) | {"order": order}
        if differences(expected, other.get("provenance", {})):
            continue
        pair = (read_records(folder / f"{name}.{which}.jsonl") for which in ("ordered", order))
        gap = gaps(name, *pair)
        about = {"model": ordered["model"], "order": order, "provenance": expected}
        write_json(folder / f"{name}.gap.{order}.json", about | gap)
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
    twice = f"--compare {place} holds several models: name the folder of one"
    require(len(files) == len(found), twice)
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
        changed = provenance_differences(path_a, path_b)
        require("data_sha256" not in changed, f"--compare: {path_a} and {path_b} are of two "
                f"versions of the data file {name}")  # fmt: skip
        gap = gaps(name, read_records(path_a), read_records(path_b))
        print_differences(f"{path_a} minus {path_b}", gap)
        for key, (old, new) in changed.items():
            if key != "model_fingerprint":
                print(f"  they differ in {key}: {old!r:.60} and {new!r:.60}")


def provenance_differences(path_a: Path, path_b: Path) -> dict[str, tuple]:
    """Where the provenances of two results files differ; nothing if one has none beside it."""
    summaries = (read_summary(path.with_suffix(".summary.json")) for path in (path_a, path_b))
    old, new = ((summary or {}).get("provenance", {}) for summary in summaries)
    return differences(old, new) if old and new else {}


def print_table(folders: list[str]) -> None:
    """Table 1 from all summaries below some folders."""
    for folder in folders:
        require(Path(folder).is_dir(), f"--table {folder} is no folder")
    files = {file for folder in folders for file in Path(folder).rglob("*.summary.json")}
    summaries = [read_summary(file) for file in sorted(files)]
    summaries = [summary for summary in summaries if "scores" in summary]
    require(summaries, f"--table: no summary of eval.py below {', '.join(folders)}")
    print(markdown_table(summaries), end="")
