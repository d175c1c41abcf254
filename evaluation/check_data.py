"""What a data file holds, and what training could not use of it: `python data.py FILE`.

    python data.py Video-R1-data/Video-R1-260k.json             rows, composition, missing files
    python data.py FILE --decode all                            decodes every file too
    python data.py FILE --decode 500 --model MODEL              counts tokens too
    python data.py FILE --take STAR=900 CLEVRER=900 --out OUT   writes a balanced subset (Sec. 3.1)

A row would be used if training with --skip_bad_samples true would use it, as far as the flags
look: media are decoded with --decode, lengths need --model. The exit code is 0 if every row would
be used, 1 if one would not, 2 for a wrong flag or file.
"""

import json
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
from data import Sample
from infra.distributed import run_main
from infra.errors import MediaError, UnusableSample, UserError, require
from infra.flags import FlagParser, flag
from infra.video import DecoderPool, check_file
from model import forbidden_tokens, load_tokenizer, require_room, resolve_folder

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
SIDE = data.PATCH * data.MERGE  # pixels
ONE_TOKEN = np.zeros((1, SIDE, SIDE, 3), np.uint8)  # frames of one vision token

File = tuple[str, str]  # data_type and path: decoded once, however many rows ask about it


@dataclass
class CheckConfig(MediaConfig):
    """Flags of `python data.py FILE`."""

    data_root: str = flag("", "what the rows' paths are relative to; default: the file's folder")
    stage: str = flag("", "stage that the rows are for; default: by whether most have a process",
                      choices=("", "rl", "sft"))  # fmt: skip
    decode: str = flag("", "a number of files to decode, drawn by --seed, or all")
    model: str = flag("", "model folder or Hub id: prompt and response must fit its positions")
    max_new_tokens: int = flag(768, "with --model, stage rl: room for a response", low=1)
    take: list[str] = flag([], "SOURCE=N [SOURCE=N ..]: write N rows of each data_source to --out")
    out: str = flag("", "file that --take writes; it must not exist")
    seed: int = flag(0, "of what --decode and --take draw", low=0)

    def check(self) -> None:
        """Raise UserError naming the first flag whose value makes no sense."""
        super().check()
        number = self.decode.isdecimal() and int(self.decode) >= 1
        allowed = number or self.decode in ("", "all")
        require(allowed, f"--decode takes a number of files or all, not {self.decode!r}")
        parse_take(self.take)
        require(bool(self.take) == bool(self.out), "--take SOURCE=N and --out FILE need each other")
        if self.out:
            require(not os.path.lexists(self.out), f"--out {self.out} exists already")
            folder = Path(self.out).parent
            require(folder.is_dir(), f"--out {self.out}: {folder} is not a folder")


def parse_flags(argv: list[str] | None = None) -> tuple[str, CheckConfig]:
    """The data file and the config of a command line.

    Raises:
        UserError: no file, an unknown or abbreviated flag, a value of the wrong type.
    """
    parser = FlagParser(
        CheckConfig,
        allow_abbrev=False,
        description="Checks a data file, and the videos and images that it names, before training",
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


def composition(samples: list[Sample], root: Path) -> dict[str, Counter]:
    """Rows by category of Figure 2, data_source, data_type and problem_type."""
    return {
        "category": Counter(category_of(sample, root) for sample in samples),
        "data_source": Counter(source_of(sample, root) for sample in samples),
        "data_type": Counter(sample.data_type for sample in samples),
        "problem_type": Counter(sample.problem_type for sample in samples),
    }


def print_lines(lines: Iterable[str], most: int = MOST_FAULTS, indent: str = "  ") -> None:
    lines = list(lines)
    for line in lines[:most]:
        print(indent + line)
    if len(lines) > most:
        print(f"{indent}.. and {len(lines) - most:,} more")


def print_composition(samples: list[Sample], root: Path) -> None:
    """Count and share of the readable rows, in four ways; the largest first."""
    paper = {category: f"   paper: {count}" for category, (_, count, _) in CATEGORIES.items()}
    for title, counts in composition(samples, root).items():
        print(f"\n{title:42}     rows   share")
        lines = [f"{name:40} {count:9,}  {count / len(samples):6.1%}{paper.get(name, '')}"
                 for name, count in counts.most_common()]  # fmt: skip
        print_lines(lines, MOST_COUNTS)


def usable_rows(samples: list[Sample], stage: str) -> tuple[list[Sample], list[str]]:
    """The samples that training of a stage takes, and why it leaves out the others."""
    usable, faults = [], []
    for sample in samples:
        try:
            data.require_no_vision_tokens(sample)
            (data.require_process if stage == "sft" else data.require_solution)(sample)
            usable.append(sample)
        except UserError as error:
            faults.append(str(error))
    return usable, faults


# -------------------------------------------------------------------------------- files, lengths


def file_of(sample: Sample) -> File:
    return sample.data_type, sample.path


def missing_files(samples: list[Sample]) -> tuple[int, dict[File, str]]:
    """How many files there are, and why some cannot be opened. A video may be in another
    container."""

    def reason(file: File) -> str:
        try:
            check_file(data.video_path(file[1]) if file[0] == "video" else file[1])
        except MediaError as error:
            return str(error)
        return ""

    files = list(dict.fromkeys(map(file_of, samples)))
    with ThreadPoolExecutor(4) as threads:  # on a network drive each look waits
        found = tqdm(threads.map(reason, files), "files", len(files), dynamic_ncols=True)
        reasons = dict(zip(files, found, strict=True))
    return len(files), {file: why for file, why in reasons.items() if why}


class Measure:
    """Prompt and response of a row in tokens, by the code that training runs.

    lengths: tokens of prompt and response by row. faults: why a row does not fit, by row.
    """

    def __init__(self, config: CheckConfig, stage: str, template: str):
        self.tokenizer = load_tokenizer(config.model)
        self.config = AutoConfig.from_pretrained(resolve_folder(config.model))
        self.num_new_tokens = config.max_new_tokens
        self.stage, self.template = stage, template
        self.lengths: dict[int, int] = {}
        self.faults: dict[int, str] = {}

    def __call__(self, sample: Sample, frames) -> None:
        """frames: as make_prompt takes them."""
        prompt = data.make_prompt(sample, self.tokenizer, frames, template=self.template)
        num_new_tokens = self.num_new_tokens
        try:
            if self.stage == "sft":
                response = data.response_ids(sample, self.tokenizer)
                num_new_tokens = len(response)
                spelled = set(response.tolist()) & set(forbidden_tokens(self.config))
                if spelled:
                    raise UnusableSample(
                        f"its response spells {self.tokenizer.decode(sorted(spelled))}, which the "
                        "model can never sample: its log-probability is -inf"
                    )
            require_room(prompt, num_new_tokens, self.config)
        except UnusableSample as error:
            self.faults[sample.row] = f"row {sample.row} (problem {sample.problem_id}): {error}"
        self.lengths[sample.row] = len(prompt.input_ids) + num_new_tokens


def decode_files(
    samples: list[Sample], config: CheckConfig, measure: Measure | None
) -> tuple[int, dict[File, str]]:
    """Decode --decode of the samples' files, each once, and measure the rows that ask about it.

    Returns:
        how many files were tried, and why some cannot be decoded.
    """
    rows = defaultdict(list)
    for sample in samples:
        rows[file_of(sample)].append(sample)
    files = list(rows)
    if config.decode != "all" and int(config.decode) < len(files):
        files = random.Random(config.seed).sample(files, int(config.decode))
    reasons, waiting = {}, deque()
    ahead = 2 * config.num_workers  # the frames of so many files are in memory at most
    with (
        DecoderPool(config.num_workers, config.decode_timeout) as pool,
        tqdm(total=len(files), desc="decoding", unit="file", dynamic_ncols=True) as bar,
    ):
        for turn in range(len(files) + ahead):
            if turn < len(files):
                sample = rows[files[turn]][0]
                waiting.append(data.submit_decode(pool, sample, config.limits()))
            if turn >= ahead:
                file = files[turn - ahead]
                try:
                    frames = waiting.popleft().result()
                except MediaError as error:
                    reasons[file] = str(error)
                else:
                    for sample in rows[file] if measure else ():
                        measure(sample, frames)
                bar.update()
    return len(files), reasons


def print_bad_files(reasons: dict[File, str], samples: list[Sample], root: Path, most: int) -> None:
    """Unusable files by source, the worst source first: how many, and the first reasons."""
    by_source: dict[str, dict[File, str]] = defaultdict(dict)
    for sample in samples:
        if file_of(sample) in reasons:
            by_source[source_of(sample, root)][file_of(sample)] = reasons[file_of(sample)]
    for source, bad in sorted(by_source.items(), key=lambda item: -len(item[1])):
        print(f"  {source}: {len(bad):,}")
        print_lines(bad.values(), most, indent="    ")


def print_lengths(measure: Measure, samples: list[Sample]) -> None:
    """Quantiles of the lengths and the rows that do not fit. Rows whose media were not decoded are
    measured with one vision token, so that only their text counts."""
    decoded = list(measure.lengths.values())
    for sample in tqdm(samples, desc="lengths", unit="row", dynamic_ncols=True):
        if sample.row not in measure.lengths:
            measure(sample, ONE_TOKEN)
    what = "rows of decoded files" if decoded else "rows, without their vision tokens (--decode)"
    lengths = decoded or list(measure.lengths.values())
    print(f"\nTokens of prompt and response, {len(lengths):,} {what}")
    if lengths:  # each quantile is a length that occurs
        values = np.quantile(lengths, (0, 0.5, 0.95, 1), method="inverted_cdf")
        print("  min {:,}   median {:,}   95th percentile {:,}   max {:,}".format(*values))
    print(f"  rows that the model cannot take: {len(measure.faults):,}")
    print_lines((measure.faults[row] for row in sorted(measure.faults)), indent="    ")


# -------------------------------------------------------------------------------------- the subset


def write_subset(
    file: str, root: Path, used: list[Sample], wanted: dict[str, int], config: CheckConfig
) -> None:
    """Draw N rows of each source without replacement, and write them as they are, in the file's
    order. What is drawn from a source depends on the seed and on its own rows alone.

    Raises:
        UserError: a source has fewer usable rows.
    """
    drawn: set[int] = set()
    for source, number in wanted.items():
        rows = [sample.row for sample in used if source_of(sample, root) == source]
        few = f"--take {source}={number}: only {len(rows):,} rows of {source} can be used"
        require(len(rows) >= number, few)
        drawn.update(random.Random(f"{config.seed} {source}").sample(rows, number))
    rows, _ = data.read_rows(Path(file))
    text = ",\n".join(json.dumps(row) for number, row in rows.items() if number in drawn)
    Path(config.out).write_text(f"[\n{text}\n]\n", encoding="utf-8")
    print(f"\n{len(drawn):,} rows written; to train on them: --data {config.out} "
          f"--data_root {root}")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Print the report on a data file; exits with 1 if a row of it would not be used."""
    file, config = parse_flags(argv)
    config.check()
    template = data.load_template(config.prompt_template)
    samples, faults = data.check_rows(file, config.data_root or None)
    num_rows = len(samples) + len(faults)
    with_process = sum(bool(sample.process.strip()) for sample in samples)
    stage = config.stage or ("sft" if 2 * with_process > len(samples) else "rl")
    measure = Measure(config, stage, template) if config.model else None
    root = Path(config.data_root or Path(file).parent).absolute()
    wanted, sources = parse_take(config.take), {source_of(sample, root) for sample in samples}
    for source in wanted:
        known = ", ".join(sorted(sources))
        require(source in sources, f"--take {source}: no such source; known are {known}")

    assumed = "" if config.stage else f", assumed: {with_process:,} rows have a process"
    print(f"{file}: {num_rows:,} rows (--stage {stage}{assumed})")
    used, unusable = usable_rows(samples, stage)
    faults += [f"{file}, {fault}" for fault in unusable]
    print(f"Rows that cannot be used: {len(faults):,}")
    print_lines(faults)
    print_composition(samples, root)

    num_files, bad = missing_files(samples)
    print(f"\nFiles that are missing: {len(bad):,} of {num_files:,}")
    print_bad_files(bad, samples, root, most=3)
    used = [sample for sample in used if file_of(sample) not in bad]
    if config.decode:
        num_files, bad = decode_files(used, config, measure)
        print(f"\nFiles that cannot be decoded: {len(bad):,} of {num_files:,} that were tried")
        print_bad_files(bad, used, root, MOST_FAULTS)
        used = [sample for sample in used if file_of(sample) not in bad]
    if measure:
        print_lengths(measure, used)
        used = [sample for sample in used if sample.row not in measure.faults]
    if wanted:
        write_subset(file, root, used, wanted, config)
    print(f"\n{len(used):,} of {num_rows:,} rows would be used")
    if len(used) < num_rows:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
