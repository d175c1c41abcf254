"""Evaluation: scores of a model on benchmark files, in one or several frame orders.

    python eval.py                              the toy: SFT and RL model, ordered and shuffled
    torchrun --nproc_per_node 8 eval.py --model runs/rl/model --data Evaluation/eval_mvbench.json \\
        --max_frames 32
    torchrun --nproc_per_node 8 eval.py --model runs/rl/model --benchmarks mvbench,vsibench \\
        --data_root Video-R1-eval --preset paper-16 --order ordered,shuffled
    python eval.py --table runs/eval            Table 1 from the summaries below a folder
    python eval.py --compare runs/eval/a runs/eval/b         paired differences, a minus b
    python eval.py --judge JUDGE_MODEL RESULTS.jsonl         Section 4.5, Figure 6 (judge.py)
    python eval.py --model runs/rl/model --video video.mp4 --question "What happens?"

Decoding is the paper's (Section 4.1): temperature 0.01 and top_p 0.001, which is all but greedy.
`accuracy` is over usable multiple choice and numerical items; `scores` are those of the benchmark's
authors and of the paper's (scores.py). The same command resumes an interrupted evaluation, on any
number of ranks, and tries items again whose media have become usable (results.py).
"""

import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import toy
from config import PRECISIONS, MediaConfig
from data import ORDERS, Sample, load_samples, load_template
from evaluation.answering import (
    PATIENCE,
    fixed_batches,
    item_record,
    provenance,
    responder,
    summarise,
)
from evaluation.judge import judge
from evaluation.report import compare, print_summary, print_table, write_gaps
from evaluation.results import Results, file_sha256, read_summary
from evaluation.scores import BENCHMARKS, score_benchmark
from infra.distributed import World, log, main_does, process_group, run_main
from infra.errors import UserError, require
from infra.flags import flag, parse_config
from rewards import extract_answer

REAL_COMMAND = (
    "torchrun --nproc_per_node 8 eval.py --model runs/rl/model "
    "--data Evaluation/eval_mvbench.json --max_frames 32"
)
NAMES = tuple(name for name in BENCHMARKS if name != "generic")
# Section 4.1, with pixels, temperature and top_p, which are the defaults.
PRESETS = {"paper-16": 16, "paper-32": 32, "paper-64": 64}
MODES = ("compare", "table", "judge", "video", "image")  # what is done instead of an evaluation
# Flags that change no record: everything else is part of the provenance of results.
NOT_IN_RECORDS = (
    *MODES, "model", "data", "benchmarks", "output_dir", "preset", "num_workers", "overwrite",
    "sharded_generation", "prompt_template", "question", "options", "precision",
)  # fmt: skip


@dataclass
class EvalConfig(MediaConfig):
    """Flags of the evaluation."""

    model: str = flag("", "model folder or Hub id; without --model and --data: the toy")
    data: list[str] = flag([], "data files in the official format")
    benchmarks: str = flag("", f"instead of --data: {','.join(NAMES)}, found below --data_root")
    data_root: str = flag("", "what the rows' paths are relative to; default: each file's folder")
    output_dir: str = flag("runs/eval", "where the results go")
    overwrite: bool = flag(False, "replace results that other settings made")
    preset: str = flag("", "the paper's frames (Sec. 4.1)", choices=("", *PRESETS))
    order: str = flag("ordered", f"order of the frames, or several: {','.join(ORDERS)}")
    max_pixels: int = flag(256 * 28 * 28, "pixels of a video frame at most (Sec. 4.1)")
    batch_size: int = flag(8, "items that are generated together, per rank", low=1)
    max_new_tokens: int = flag(768, "length of a response at most, in tokens (App. D)", low=1)
    temperature: float = flag(0.01, "divides the logits (Sec. 4.1)", above=0)
    top_p: float = flag(
        0.001, "sample from the most likely tokens of this mass (Sec. 4.1)", above=0, high=1
    )
    seed: int = flag(0, "of the shuffles and of the sampling", low=0)
    precision: str = flag("", "fp32 or bf16; default: by device", choices=PRECISIONS)
    sharded_generation: bool = flag(False, "for a model that does not fit one GPU; slow")
    compare: list[str] = flag([], "two results files or folders: the paired difference A - B")
    table: list[str] = flag([], "folders with summaries: Table 1 in Markdown")
    judge: list[str] = flag([], "a judge model, then results files (Sec. 4.5)")
    video: str = flag("", "one video to ask --question about")
    image: str = flag("", "one image to ask --question about")
    question: str = flag("", "with --video or --image")
    options: list[str] = flag([], 'of a multiple-choice --question: "A. left" "B. right"')

    def check(self) -> None:
        """Raise UserError naming the first flag whose value makes no sense."""
        super().check()
        orders = self.order.split(",")
        known = set(orders) <= set(ORDERS) and len(set(orders)) == len(orders)
        require(known, f"--order takes one or several of {','.join(ORDERS)}, not {self.order!r}")
        names = [Path(path).stem for path in self.data]
        require(len(set(names)) == len(names),
                f"--data has two files of one name, whose results would be one: {', '.join(names)}")
        folder = Path(self.output_dir)
        require(not folder.exists() or folder.is_dir(), f"--output_dir {folder} is not a folder")


TOY_DEFAULTS = {
    "order": "ordered,shuffled", "model": str(toy.SFT / "model"), "data": [str(toy.TEST_DATA)],
    "output_dir": str(toy.FOLDER / "eval"), "max_frames": toy.NUM_FRAMES, "batch_size": 64,
    "max_new_tokens": 40,
}  # fmt: skip


# ----------------------------------------------------------------------------------- command line


def parse_command(argv: list[str]) -> tuple[EvalConfig, bool]:
    """The config of a command line, preset and benchmarks resolved; and whether it is the toy's.

    Raises:
        UserError: naming the flag.
    """
    given = {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    inputs = [name for name in (*MODES, "benchmarks", "data") if name in given]
    require(len(inputs) <= 1, f"--{' and --'.join(inputs)} exclude each other")
    names_its_input = bool(inputs) and inputs != ["data"]
    if names_its_input:  # parse_config takes --model with --data, or neither
        needs_model = inputs[0] in ("benchmarks", "video", "image")
        require("model" in given or not needs_model, f"--{inputs[0]} needs --model")
        argv = [*argv, *(f"--{name}=-" for name in ("model", "data") if name not in given)]
    config, is_toy = parse_config(EvalConfig, TOY_DEFAULTS, REAL_COMMAND, argv)
    for name in {*inputs, "model"} & given:
        value = getattr(config, name)
        require(all([value] if isinstance(value, str) else value), f"--{name} is empty")
    if names_its_input:
        config.data = find_benchmarks(config) if config.benchmarks else []
    if config.preset:
        require("max_frames" not in given, "--preset and --max_frames exclude each other")
        config.max_frames = PRESETS.get(config.preset, config.max_frames)
    config.check()
    return config, is_toy


def find_benchmarks(config: EvalConfig) -> list[str]:
    """The files of --benchmarks: eval_<name>.json in --data_root or in its folder Evaluation."""
    require(config.data_root, "--benchmarks needs --data_root, the folder that holds eval_*.json")
    files = []
    for name in config.benchmarks.split(","):
        require(name in NAMES, f"--benchmarks takes {', '.join(NAMES)}, not {name!r}")
        root = Path(config.data_root)
        places = [root / f"eval_{name}.json", root / "Evaluation" / f"eval_{name}.json"]
        found = [place for place in places if place.is_file()]
        require(found, f"--benchmarks {name}: neither {places[0]} nor {places[1]} is there")
        files.append(str(found[0]))
    return files


# ------------------------------------------------------------------------------------ evaluation


def evaluate(config: EvalConfig, world: World, is_toy: bool) -> list[dict]:
    """Evaluate one model on every data file in every order; the summaries, on rank 0 (else [])."""
    # Everything that can be wrong with flags and files shows before the first item.
    samples = {path: load_samples(path, config.data_root or None) for path in config.data}
    template = load_template(config.prompt_template)
    name = config.model.strip("./").replace("/", "--")
    folder = Path(config.output_dir) / (name or Path(config.model).resolve().name)
    orders, jobs = config.order.split(","), {}
    model_and_flags = provenance(config, NOT_IN_RECORDS, world, template)
    for path in config.data:
        made_by = model_and_flags | {"data_sha256": file_sha256(path)}
        batches = fixed_batches(samples[path], config.batch_size)
        for order in orders:
            jobs[path, order] = Results(
                folder, f"{Path(path).stem}.{order}", made_by | {"order": order}, world, batches,
                {"model_fingerprint"}, config.overwrite,
            )  # fmt: skip
    summaries = []
    has_work = not all(results.finished for results in jobs.values())
    with responder(config, world, template) if has_work else nullcontext() as answers:
        for (path, order), results in jobs.items():
            if not results.finished:
                here = replace(config, order=order)
                results.run(
                    lambda batches, order=order: (
                        (number, [item_record(found, order) for found in batch])
                        for number, batch in answers(batches, order)
                    ),
                    partial(summary_of, here, path, is_toy), in_step=config.sharded_generation,
                )  # fmt: skip
            if world.is_main:
                summaries.append(read_summary(results.summary_file))
                if not is_toy:
                    print_summary(summaries[-1])
                if order == orders[-1]:
                    write_gaps(folder, Path(path).stem, orders, quiet=is_toy)
    return summaries


def summary_of(config: EvalConfig, path: str, is_toy: bool, items: list[dict]) -> dict:
    return {
        "model": config.model, "benchmark": Path(path).stem, "order": config.order,
        **summarise(items, is_toy), "scores": score_benchmark(Path(path).stem, items),
        "settings": asdict(config),
    }  # fmt: skip


def evaluate_toy(config: EvalConfig, world: World) -> None:
    """The toy's test set for SFT and RL, and a table."""
    models = {"SFT": toy.SFT / "model", "RL": toy.RL / "model"}
    for stage, folder in models.items():
        require(folder.is_dir(), f"{folder} is not there: run train_{stage.lower()}.py first")
    orders = config.order.split(",")
    both = orders[:2] == ["ordered", "shuffled"]
    lines = ["model" + "".join(f"{order + ' frames':>18}" for order in orders)]
    lines[0] += f"{'gap':>8}" * both
    for stage, folder in models.items():
        summaries = evaluate(replace(config, model=str(folder)), world, is_toy=True)
        if world.is_main:
            scores = [100 * summary["accuracy"] for summary in summaries]
            lines.append(f"{stage:5}" + "".join(f"{score:18.1f}" for score in scores))
            lines[-1] += f"{scores[0] - scores[1]:+8.1f}" if both else ""
    if world.is_main:
        print("\nThe toy's test set: accuracy in percent over "
              f"{summaries[0]['n']} video questions\n", *lines, sep="\n")  # fmt: skip


def answer_one(config: EvalConfig, world: World) -> None:
    """Print the response to one question about one video or image."""
    kind = "video" if config.video else "image"
    path = config.video or config.image
    require(Path(path).is_file(), f"--{kind} {path} is not a file")
    require(config.question.strip(), f"--{kind} needs --question")
    sample = Sample(  # its solution is not used, but must be one of its type
        problem_id=0, problem=config.question, data_type=kind, options=tuple(config.options),
        problem_type="multiple choice" if config.options else "free-form", solution="A", path=path,
        data_source="", process="", row=0,
    )  # fmt: skip
    with responder(config, world, load_template(config.prompt_template)) as answers:
        ((_, (found,)),) = answers([(0, [sample])])
    if found.rollout is None:
        raise UserError(found.error)
    text = found.rollout.texts[0]
    cut = "" if found.rollout.ended[0] else f" (cut at --max_new_tokens {config.max_new_tokens})"
    log(f"{text}{cut}\n\nAnswer: {extract_answer(text) or 'none'}")


def main() -> None:
    config, is_toy = parse_command(sys.argv[1:])
    if config.table:
        return print_table(config.table)
    if config.compare:
        require(len(config.compare) == 2, "--compare takes two results files or two folders")
        return compare(*config.compare)
    with process_group(PATIENCE, precision=config.precision, cpu_fallback=is_toy) as world:
        if config.judge:
            require(len(config.judge) > 1, "--judge takes a model and then results files")
            name, *files = config.judge
            judge(name, files, world, config.batch_size, config.sharded_generation,
                  config.overwrite)  # fmt: skip
        elif config.video or config.image:
            answer_one(config, world)
        elif is_toy:
            log(f"the embedded toy (neither --model nor --data given); a real run: {REAL_COMMAND}")
            main_does(world, toy.ensure_toy)
            evaluate_toy(config, world)
        else:
            evaluate(config, world, is_toy=False)


if __name__ == "__main__":
    run_main(main)
