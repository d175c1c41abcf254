"""What a data file holds, and what a training could not use of it: `python data.py FILE`.

    python data.py Video-R1-data/Video-R1-260k.json             rows, composition, missing files
    python data.py FILE --decode all                            decodes every file too
    python data.py FILE --decode 500 --model MODEL              counts the prompts' tokens too
    python data.py FILE --take STAR=900 CLEVRER=900 --out OUT   writes a balanced subset (Sec. 3.1)

The exit code is 0 if every row would be used, 1 if one would not, 2 for a wrong flag or file.
"""

import itertools
import json
import math
import os
import random
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoConfig

import data
from config import MediaConfig
from data import FACTOR, MAX_ASPECT, Sample, require_solution
from infra.distributed import run
from infra.errors import MediaError, UserError, require
from infra.flags import FlagParser, flag
from infra.video import DecoderPool, check_file, smart_resize
from model import load_tokenizer, resolve_folder

# The categories of Figure 2: data_type, rows in Video-R1-260k, and by what a row is known: a folder
# of its path or the first part of its data_source. The first names of a line are the folders of the
# data set's card (huggingface.co/datasets/Video-R1/Video-R1-data), which hold every row of it; the
# others are the sources of its rows, for files that were moved.
CATEGORIES = {
    "General (Video)": ("video", "116k", (
        "CLEVRER", "LLaVA-Video-178K", "NeXT-QA", "PerceptionTest", "STAR")),
    "General (Image)": ("image", "15k", (
        "General", "A-OKVQA", "IconQA", "ShareGPT4V", "ShareGPT4o", "Visual7W")),
    "Chart (Image)": ("image", "21k", (
        "Chart", "FigureQA", "DVQA", "PlotQA", "ChartQA", "MapQA", "TabMWP", "Chart2Text",
        "RoBUT-SQA", "VisualWebInstruct", "VisualWebInstruct(filtered)")),
    "OCR (Image)": ("image", "16k", (
        "OCR", "TextVQA", "HME100k", "ChromeWriting", "IAM", "Rendered Text", "TextCaps",
        "TextOCR")),
    "Math (Image)": ("image", "37k", (
        "Math", "Multimath-300k", "UniGeo", "Geometry3K", "GeoQA+", "Super-CLEVR", "CLEVR-Math",
        "GEOS")),
    "Knowledge (Image)": ("image", "37k", (
        "Knowledge", "ArxivQA", "PMC-VQA", "AI2D", "AI2D-gpt4v", "ScienceQA", "GVLQA", "TQA",
        "EXAMS-V", "VQA-RAD")),
    "Spatial (Image)": ("image", "20k", ("Spatial", "OpenSpaces", "Spacellava")),
}  # fmt: skip
CATEGORY_OF = {
    (data_type, name): category
    for category, (data_type, _, names) in CATEGORIES.items()
    for name in names
}
MOST_FAULTS, MOST_COUNTS = 20, 60  # lines of a list and of a table
FILES_PER_JOB = 1000  # that one thread looks for

File = tuple[str, str]  # data_type and path: decoded once, however many rows ask about it


@dataclass
class CheckConfig(MediaConfig):
    """Flags of `python data.py FILE`."""

    data_root: str = flag("", "what the rows' paths are relative to; default: the file's folder")
    stage: str = flag("", "training that the rows are for, rl or sft; default: what they look like")
    decode: str = flag("", "a number of files to decode, drawn by --seed, or all")
    model: str = flag("", "model folder or Hub id, whose tokenizer counts the prompts' tokens")
    take: list[str] = flag([], "SOURCE=N [SOURCE=N ..]: write N rows of each data_source to --out")
    out: str = flag("", "file that --take writes; it must not exist")
    seed: int = flag(0, "of what --decode and --take draw")

    def check(self) -> None:
        """Raises UserError naming the first flag whose value makes no sense."""
        super().check()
        require(self.seed >= 0, "--seed must not be negative")
        require(self.stage in ("", "rl", "sft"), "--stage takes rl or sft")
        number = self.decode.isdecimal() and int(self.decode) >= 1
        allowed = number or self.decode in ("", "all")
        require(allowed, f"--decode takes a number of files or all, not {self.decode!r}")
        parse_take(self.take)
        require(self.out or not self.take, "--take is given without --out: where to write?")
        require(self.take or not self.out, "--out is given without --take SOURCE=N: what to write?")
        if self.out:
            out = Path(self.out)
            require(not os.path.lexists(out), f"--out {out} exists already: name another file")
            writable = out.parent.is_dir() and os.access(out.parent, os.W_OK)
            require(writable, f"--out {out}: {out.parent} is no folder that can be written to")


def parse_flags(argv: list[str] | None = None) -> tuple[str, CheckConfig]:
    """The data file and the config of a command line.

    Raises:
        UserError: no file, an unknown or abbreviated flag, a value of the wrong type.
    """
    parser = FlagParser(
        CheckConfig,
        allow_abbrev=False,
        description="Checks a data file, and the clips and pictures that it names, before training",
        epilog="Exit code: 0 every row would be used, 1 one would not, 2 a wrong flag or file.",
    )
    parser.add_argument("FILE", help="JSON list, or JSON lines, of rows in the official format")
    config, given, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    require(not rest, f"unknown argument {rest[0]!r}; --help lists the flags" if rest else "")
    return given.FILE, config


def parse_take(words: list[str]) -> dict[str, int]:
    """Rows to draw by source, from "SOURCE=N" (the last "=" counts)."""
    wanted = {}
    for word in words:
        source, _, number = word.rpartition("=")
        right = source and number.isdecimal() and int(number) >= 1
        require(right, f"--take takes SOURCE=N with N of at least 1, not {word!r}")
        require(source not in wanted, f"--take names {source} twice")
        wanted[source] = int(number)
    return wanted


# ------------------------------------------------------------------------- rows and composition


def folders_of(sample: Sample, root: Path) -> list[str]:
    """The folders that a row's file lies in, from the data root's own name on."""
    return sample.path.removeprefix(str(root.parent)).strip("/").split("/")[:-1]


def source_of(sample: Sample, root: Path) -> str:
    """data_source; where it is blank (as ArxivQA's), two folders: ./Knowledge/ArxivQA/images/x.jpg
    is of the source Knowledge/ArxivQA."""
    below = [name for name in folders_of(sample, root)[1:] if name != "Video-R1-data"]
    return sample.data_source.strip() or "/".join(below[:2]) or "(no source)"


def category_of(sample: Sample, root: Path) -> str:
    """The category of Figure 2, by path and then by data_source; else "other" and the source."""
    names = [*folders_of(sample, root), sample.data_source.strip().split("/")[0]]
    known = (CATEGORY_OF.get((sample.data_type, name)) for name in names)
    return next(filter(None, known), f"other: {source_of(sample, root)}")


def print_lines(lines: Iterable[str], most: int = MOST_FAULTS, indent: str = "  ") -> None:
    lines = list(lines)
    for line in lines[:most]:
        print(indent + line)
    if len(lines) > most:
        print(f"{indent}.. and {len(lines) - most:,} more")


def report_rows(
    samples: list[Sample], unreadable: list[str], config: CheckConfig, file: str
) -> list[Sample]:
    """Print the rows that cannot be used; returns the samples that training.load_inputs takes."""
    with_process = sum(bool(sample.process.strip()) for sample in samples)
    stage = config.stage or ("sft" if 2 * with_process > len(samples) else "rl")
    faults, usable = list(unreadable), []
    for sample in samples:
        try:
            data.require_no_vision_tokens(sample)
            (data.require_process if stage == "sft" else require_solution)(sample)
            usable.append(sample)
        except UserError as error:
            faults.append(f"{file}, {error}")
    assumed = "" if config.stage else f", assumed: {with_process:,} rows have a process"
    print(f"{file}: {len(samples) + len(unreadable):,} rows (--stage {stage}{assumed})")
    print(f"Rows that cannot be used: {len(faults):,}")
    print_lines(faults)
    return usable


def report_composition(samples: list[Sample], sources: dict[int, str], root: Path) -> None:
    """Print count and share of the rows that can be read, in four ways; the largest first."""
    paper = {category: f"   paper: {count}" for category, (_, count, _) in CATEGORIES.items()}
    for title, names in {
        "category": [category_of(sample, root) for sample in samples],
        "data_source": [sources[sample.row] for sample in samples],
        "data_type": [sample.data_type for sample in samples],
        "problem_type": [sample.problem_type for sample in samples],
    }.items():
        print(f"\n{title:42}     rows   share")
        lines = [f"{name:40} {count:9,}  {count / len(names):6.1%}{paper.get(name, '')}"
                 for name, count in Counter(names).most_common()]  # fmt: skip
        print_lines(lines, MOST_COUNTS)


# -------------------------------------------------------------------------------------------- files


def file_of(sample: Sample) -> File:
    return sample.data_type, sample.path


def report_missing(samples: list[Sample], sources: dict[int, str]) -> set[File]:
    """Print, and return, the files that are not there or are empty."""
    files = list(dict.fromkeys(map(file_of, samples)))
    jobs = [files[start : start + FILES_PER_JOB] for start in range(0, len(files), FILES_PER_JOB)]
    reasons = {}
    with (
        ThreadPoolExecutor(4) as threads,  # on a network drive each look waits
        tqdm(total=len(files), desc="files", unit="file", dynamic_ncols=True) as bar,
    ):
        for job, found in zip(jobs, threads.map(look_for, jobs), strict=True):
            reasons |= found
            bar.update(len(job))
    print(f"\nFiles that are missing: {len(reasons):,} of {len(files):,}")
    print_bad_files(reasons, samples, sources, most=3)
    return set(reasons)


def look_for(files: list[File]) -> dict[File, str]:
    """The files that cannot be opened, and why. A clip may be in another container."""
    reasons = {}
    for data_type, path in files:
        try:
            check_file(data.video_path(path) if data_type == "video" else path)
        except MediaError as error:
            reasons[data_type, path] = str(error)
    return reasons


def print_bad_files(
    reasons: dict[File, str], samples: list[Sample], sources: dict[int, str], most: int
) -> None:
    """Files that cannot be used by source, the worst first: how many, and the first reasons."""
    by_source: dict[str, dict[File, str]] = defaultdict(dict)
    for sample in samples:
        if file_of(sample) in reasons:
            by_source[sources[sample.row]][file_of(sample)] = reasons[file_of(sample)]
    for source, bad in sorted(by_source.items(), key=lambda item: -len(item[1])):
        print(f"  {source}: {len(bad):,}")
        print_lines(bad.values(), most, indent="    ")


def report_decoding(
    samples: list[Sample], sources: dict[int, str], config: CheckConfig
) -> tuple[dict[File, int], set[File]]:
    """Decode --decode of the samples' files and print those that cannot be decoded.

    Returns:
        the number of vision tokens of each file that was decoded; the files that cannot be.
    """
    sample_of = {file_of(sample): sample for sample in samples}
    files = list(sample_of)
    if config.decode != "all" and int(config.decode) < len(files):
        files = random.Random(config.seed).sample(files, int(config.decode))
    tokens, reasons, waiting = {}, {}, deque()
    ahead = 2 * config.num_workers  # the frames of so many files are in memory at most
    with (
        DecoderPool(config.num_workers, config.decode_timeout) as pool,
        tqdm(total=len(files), desc="decoding", unit="file", dynamic_ncols=True) as bar,
    ):
        for turn in range(len(files) + ahead):
            if turn < len(files):
                waiting.append(data.submit_decode(pool, sample_of[files[turn]], config.limits()))
            if turn >= ahead:
                file = files[turn - ahead]
                try:
                    tokens[file] = num_vision_tokens(waiting.popleft().result()[0].shape)
                except MediaError as error:
                    reasons[file] = str(error)
                bar.update()
    print(f"\nFiles that cannot be decoded: {len(reasons):,} of {len(files):,} that were tried")
    print_bad_files(reasons, samples, sources, MOST_FAULTS)
    return tokens, set(reasons)


# ----------------------------------------------------------------------------------------- lengths


def num_vision_tokens(shape: tuple[int, ...]) -> int:
    """What make_prompt puts into a prompt for frames of a shape (F, H, W, 3)."""
    count, height, width, _ = shape
    return math.ceil(count / data.TEMPORAL_PATCH) * (height // FACTOR) * (width // FACTOR)


def num_text_tokens(sample: Sample, tokenizer, template: str) -> int:
    """A prompt's other tokens, by make_prompt for a picture of one vision token."""
    picture = np.zeros((1, FACTOR, FACTOR, 3), np.uint8)
    return len(data.make_prompt(sample, tokenizer, picture, template=template).input_ids) - 1


def most_vision_tokens(data_type: str, limits: dict[str, int]) -> int:
    """The most vision tokens that a clip or a picture of any shape has within the limits.

    They exceed --max_pixels where a picture is thin, since its short side has a token at least, and
    where a small one is enlarged to a --min_pixels near it, since sides are rounded up. So this
    asks smart_resize about a huge and a tiny picture of each shape that media.resize takes.
    """
    most = limits["max_pixels" if data_type == "video" else "image_max_pixels"]
    pixels = max(
        math.prod(smart_resize(height, height * ratio / 100, limits["min_pixels"], most, FACTOR))
        for height, ratio in itertools.product((1e5, 0.1), range(100, 100 * MAX_ASPECT + 1))
    )
    grids = max(1, limits["max_frames"] // data.TEMPORAL_PATCH) if data_type == "video" else 1
    return grids * (max(pixels, most) // FACTOR**2)


def report_lengths(
    samples: list[Sample], tokens: dict[File, int] | None, template: str, config: CheckConfig
) -> set[int]:
    """Print the lengths of prompts in tokens; returns the rows whose prompt is too long.

    Args:
        tokens: vision tokens of the decoded files: only rows of these are measured. None: nothing
            was decoded, so the text alone is measured, of all rows.
    """
    tokenizer = load_tokenizer(config.model)
    settings = AutoConfig.from_pretrained(resolve_folder(config.model))
    limit = settings.get_text_config().max_position_embeddings
    if tokens is not None:
        samples = [sample for sample in samples if file_of(sample) in tokens]
    lengths = {}
    for sample in tqdm(samples, desc="prompts", unit="row", dynamic_ncols=True):
        seen = 0 if tokens is None else tokens[file_of(sample)]
        lengths[sample.row] = num_text_tokens(sample, tokenizer, template) + seen
    what = "their text alone" if tokens is None else "of the decoded files"
    print(f"\nTokens of prompts, {what}: {len(lengths):,} rows")
    if lengths:  # each quantile is a length that occurs
        values = np.quantile(list(lengths.values()), (0, 0.5, 0.95, 1), method="inverted_cdf")
        print("  min {:,}   median {:,}   95th percentile {:,}   max {:,}".format(*values))
    if tokens is None:
        for data_type in sorted({sample.data_type for sample in samples}):
            most = most_vision_tokens(data_type, config.limits())
            print(f"  {data_type}: at most {most:,} vision tokens more, whatever its shape")
    too_long = {row for row, length in lengths.items() if length > limit}
    print(f"  rows beyond the model's {limit:,} positions: {len(too_long):,}")
    print_lines((f"row {row}: {lengths[row]:,} tokens" for row in sorted(too_long)), indent="    ")
    return too_long


# -------------------------------------------------------------------------------------- the subset


def draw_rows(
    samples: list[Sample], sources: dict[int, str], wanted: dict[str, int], seed: int
) -> set[int]:
    """N rows of each source, without replacement. What is drawn from a source depends on the seed
    and on its own rows, not on the other sources.

    Raises:
        UserError: a source has fewer rows.
    """
    drawn: set[int] = set()
    for source, number in wanted.items():
        rows = [sample.row for sample in samples if sources[sample.row] == source]
        few = f"--take {source}={number}: only {len(rows):,} rows of {source} can be used"
        require(len(rows) >= number, few)
        drawn.update(random.Random(f"{seed} {source}").sample(rows, number))
    return drawn


def write_subset(file: str, root: Path, drawn: set[int], out: Path) -> None:
    """Write the drawn rows as they are, in the file's order: a training shuffles them anyway, and
    so the subset can be compared with the file."""
    rows, _ = data.read_rows(Path(file))
    text = ",\n".join(json.dumps(row) for number, row in rows.items() if number in drawn)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    os.replace(unfinished, out)
    print(f"\n{len(drawn):,} rows written; to train on them: --data {out} --data_root {root}")
    if out.absolute().parent != root:
        print(f"  their paths stay relative to the data root, which is not {out.parent}")


def main(argv: list[str] | None = None) -> None:
    """Print the report on a data file; exits with 1 if a row of it would not be used."""
    file, config = parse_flags(argv)
    config.check()
    template = data.load_template(config.prompt_template)
    if config.model:  # what is wrong with it shows before hours of decoding
        load_tokenizer(config.model)
    samples, unreadable = data.check_rows(file, config.data_root or None)
    root = Path(config.data_root or Path(file).parent).absolute()
    sources = {sample.row: source_of(sample, root) for sample in samples}
    wanted, known = parse_take(config.take), sorted(set(sources.values()))
    for source in wanted:
        require(source in known, f"--take {source}: no such source; known are {', '.join(known)}")

    used = report_rows(samples, unreadable, config, file)
    report_composition(samples, sources, root)
    missing = report_missing(samples, sources)
    used = [sample for sample in used if file_of(sample) not in missing]
    tokens = None
    if config.decode:
        tokens, undecodable = report_decoding(used, sources, config)
        used = [sample for sample in used if file_of(sample) not in undecodable]
    if config.model:
        too_long = report_lengths(used, tokens, template, config)
        used = [sample for sample in used if sample.row not in too_long]
    if wanted:
        write_subset(file, root, draw_rows(used, sources, wanted, config.seed), Path(config.out))
    num_rows = len(samples) + len(unreadable)
    print(f"\n{len(used):,} of {num_rows:,} rows would be used")
    if len(used) < num_rows:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
