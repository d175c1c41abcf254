"""What a data file holds, and what training could not use of it: `python data.py FILE`.

    python data.py Video-R1-data/Video-R1-260k.json             rows, composition, missing files
    python data.py FILE --decode all                            decodes every file too
    python data.py FILE --decode 500 --model MODEL              counts tokens too
    python data.py FILE --take STAR=900 CLEVRER=900 --out OUT   writes a balanced subset (Sec. 3.1)

A row would be used if training with --skip_bad_samples true would use it, as far as the flags
look: media are decoded with --decode, lengths need --model. The exit code is 0 if every row would
be used, 1 if one would not, 2 for a wrong flag or file.
"""

import itertools
import json
import os
import random
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

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
from model import load_tokenizer, require_possible, require_room, resolve_folder

# Figure 2: data_type, rows in Video-R1-260k, and the folders of their files (the data set's card).
VIDEO_FOLDERS = ("CLEVRER", "LLaVA-Video-178K", "NeXT-QA", "PerceptionTest", "STAR")
CATEGORIES = {
    "General (Video)": ("video", "116k", VIDEO_FOLDERS),
    "General (Image)": ("image", "15k", ("General",)),
    "Chart (Image)": ("image", "21k", ("Chart",)),
    "OCR (Image)": ("image", "16k", ("OCR",)),
    "Math (Image)": ("image", "37k", ("Math",)),
    "Knowledge (Image)": ("image", "37k", ("Knowledge",)),
    "Spatial (Image)": ("image", "20k", ("Spatial",)),
}
NUM_LISTED = 20  # faults of a kind
SIDE = data.PATCH * data.MERGE  # pixels
ONE_TOKEN = np.zeros((1, SIDE, SIDE, 3), np.uint8)  # frames of one vision token


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
        require(not os.path.lexists(self.out), f"--out {self.out} exists already")
        folder = Path(self.out).parent
        require(os.access(folder, os.W_OK), f"--out {self.out}: {folder} cannot be written to")


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


def folders_of(sample: Sample, root: Path) -> list[str]:
    """The folders that a row's file lies in, from the data root's own name on."""
    return sample.path.removeprefix(str(root.parent)).strip("/").split("/")[:-1]


def source_of(sample: Sample, root: Path) -> str:
    """data_source; where it is blank (as ArxivQA's), two folders: ./Knowledge/ArxivQA/images/x.jpg
    is of the source Knowledge/ArxivQA."""
    below = [name for name in folders_of(sample, root)[1:] if name != "Video-R1-data"]
    return sample.data_source.strip() or "/".join(below[:2]) or "(no source)"


def category_of(sample: Sample, root: Path) -> str:
    """The category of Figure 2, by the file's folders; else "other"."""
    folders = folders_of(sample, root)
    for category, (data_type, _, names) in CATEGORIES.items():
        if sample.data_type == data_type and set(names) & set(folders):
            return category
    return "other"


def composition(samples: list[Sample], root: Path) -> dict[str, Counter]:
    """Rows by category of Figure 2, data_source, data_type and problem_type."""
    keys = {
        "category": lambda sample: category_of(sample, root),
        "data_source": lambda sample: source_of(sample, root),
        "data_type": lambda sample: sample.data_type,
        "problem_type": lambda sample: sample.problem_type,
    }
    return {name: Counter(map(key, samples)) for name, key in keys.items()}


def print_composition(samples: list[Sample], root: Path) -> None:
    """Count and share of the readable rows, in four ways; the largest first."""
    for title, counts in composition(samples, root).items():
        print(f"\n{title:42}     rows   share")
        for name, count in counts.most_common():
            paper = f"   paper: {CATEGORIES[name][1]}" if name in CATEGORIES else ""
            print(f"  {name:40} {count:9,}  {count / len(samples):6.1%}{paper}")


# ------------------------------------------------------------------------------------ what is used


def usable(title: str, samples: list[Sample], check: Callable[[Sample], None], faults=()) -> list:
    """The samples that a check takes; prints the others' UserErrors, after known faults."""
    good, faults = [], list(faults)
    for sample in tqdm(samples, title, unit="row", dynamic_ncols=True, leave=False):
        try:
            check(sample)
            good.append(sample)
        except UserError as error:
            faults.append(error)
    print_faults(title, faults)
    return good


def print_faults(title: str, faults: list) -> None:
    """One line for each row that is not of use."""
    print(f"\n{title}: {len(faults):,} rows")
    for fault in faults[:NUM_LISTED]:
        print(f"  {fault}")
    if len(faults) > NUM_LISTED:
        print(f"  .. and {len(faults) - NUM_LISTED:,} more")


def require_file(sample: Sample) -> None:
    """Raise MediaError if the file cannot be opened."""
    check_file(data.video_path(sample.path) if sample.is_video else sample.path)


def decode_files(files: list[Sample], config: CheckConfig) -> Iterator[tuple[str, object]]:
    """Paths with their frames, or a MediaError, in the order of the files."""
    waiting, todo = deque(), iter(files)
    with DecoderPool(config.num_workers, config.decode_timeout) as pool:
        for file in tqdm(files, "decoding", unit="file", dynamic_ncols=True):
            # The frames of so many files are in memory at most.
            for sample in itertools.islice(todo, 2 * config.num_workers - len(waiting)):
                waiting.append(data.submit_decode(pool, sample, config.limits()))
            try:
                yield file.path, waiting.popleft().result()
            except MediaError as error:
                yield file.path, error


def length_of(config: CheckConfig, stage: str) -> Callable[[Sample, object], int]:
    """What counts the tokens of a row's prompt, with its frames, and response, by the code that
    training runs. It raises UserError if they do not fit."""
    tokenizer = load_tokenizer(config.model)
    model_config = AutoConfig.from_pretrained(resolve_folder(config.model))
    template = data.load_template(config.prompt_template)

    def length(sample: Sample, frames) -> int:
        prompt = data.make_prompt(sample, tokenizer, frames, template=template)
        num_new_tokens = config.max_new_tokens
        try:
            if stage == "sft":
                response = data.response_ids(sample, tokenizer)
                require_possible(response, model_config)
                num_new_tokens = len(response)
            require_room(prompt, num_new_tokens, model_config)
        except UnusableSample as error:
            raise UserError(f"{sample.name}: {error}") from None
        return len(prompt.input_ids) + num_new_tokens

    return length


def usable_media(
    samples: list[Sample], config: CheckConfig, length: Callable[[Sample, object], int]
) -> list[Sample]:
    """The samples whose files, as far as --decode looks, can be decoded and, with --model, fit.
    Without --decode one vision token stands for the media: the text alone counts."""
    of_file, lengths, faults = defaultdict(list), [], {}  # by path; of rows; by row
    for sample in samples:
        of_file[sample.path].append(sample)
    files = [rows[0] for rows in of_file.values()]
    if config.decode.isdecimal() and int(config.decode) < len(files):
        files = random.Random(config.seed).sample(files, int(config.decode))
    blank = ((file.path, ONE_TOKEN) for file in files)
    for path, frames in decode_files(files, config) if config.decode else blank:
        for sample in of_file[path]:
            try:
                if isinstance(frames, MediaError):
                    raise frames
                lengths.append(length(sample, frames))
            except UserError as error:
                faults[sample.row] = error
    print_faults("Not decodable, or too long for the model", list(faults.values()))
    if config.model and lengths:
        print(f"  Tokens of prompt and response, {len(lengths):,} other rows: median "
              f"{median_low(lengths):,}, max {max(lengths):,}")  # fmt: skip
    return [sample for sample in samples if sample.row not in faults]


def write_subset(file: str, root: Path, used: list[Sample], config: CheckConfig) -> None:
    """Draw N rows of each source without replacement, and write them as they are, in the file's
    order. What is drawn from a source depends on the seed and on its own rows alone. UserError: a
    source has fewer usable rows."""
    drawn: set[int] = set()
    for source, number in parse_take(config.take).items():
        rows = sorted(sample.row for sample in used if source_of(sample, root) == source)
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
    parser = FlagParser(CheckConfig, allow_abbrev=False, description="Checks a data file")
    parser.add_argument("FILE", help="JSON list, or JSON lines, of rows in the official format")
    config, given, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    require(not rest, f"unknown argument {rest[:1]}; --help lists the flags")
    config.check()
    file, root = given.FILE, Path(config.data_root or Path(given.FILE).parent).absolute()
    samples, faults = data.check_rows(file, config.data_root or None)
    num_rows = len(samples) + len(faults)
    with_process = sum(bool(sample.process.strip()) for sample in samples)
    stage = config.stage or ("sft" if 2 * with_process > len(samples) else "rl")
    length = length_of(config, stage) if config.model else lambda sample, frames: 0
    sources = {source_of(sample, root) for sample in samples}
    for source in parse_take(config.take):
        known = ", ".join(sorted(sources))
        require(source in sources, f"--take {source}: no such source; known are {known}")

    def require_row(sample: Sample) -> None:
        data.require_no_vision_tokens(sample)
        (data.require_process if stage == "sft" else data.require_solution)(sample)

    print(f"{file}, --stage {stage}")
    print_composition(samples, root)
    used = usable("Not readable, or of no use", samples, require_row, faults)
    used = usable("Files missing", used, require_file)
    if config.decode or config.model:
        used = usable_media(used, config, length)
    if config.take:
        write_subset(file, root, used, config)
    print(f"\n{len(used):,} of {num_rows:,} rows would be used")
    if len(used) < num_rows:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
