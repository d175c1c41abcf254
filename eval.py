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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import toy
from config import MediaConfig
from data import ORDERS, Sample, load_samples, load_template, make_prompt, submit_decode
from evaluation.answering import (
    PATIENCE,
    AnswerSettings,
    answer,
    any_decodes,
    fixed_batches,
    item_record,
    load_for_answers,
    provenance,
    summarise,
)
from evaluation.judge import judge
from evaluation.report import compare, print_summary, print_table, write_gaps
from evaluation.results import (
    Results,
    file_sha256,
    library_versions,
    model_path,
    read_summary,
    write_json,
)
from evaluation.scores import BENCHMARKS, score_benchmark
from infra.distributed import World, log, main_does, process_group, run_main
from infra.errors import UserError, require
from infra.flags import flag, parse_config
from infra.video import DecoderPool
from model import load_normalisation, load_tokenizer, require_room
from rewards import extract_answer
from sampling import sample_groups

REAL_COMMAND = (
    "torchrun --nproc_per_node 8 eval.py --model runs/rl/model "
    "--data Evaluation/eval_mvbench.json --max_frames 32"
)
NAMES = tuple(name for name in BENCHMARKS if name != "generic")
PRESETS = {  # Section 4.1
    f"paper-{frames}": {"max_frames": frames, "max_pixels": 256 * 28 * 28, "temperature": 0.01,
                        "top_p": 0.001}
    for frames in (16, 32, 64)
}  # fmt: skip
MODES = ("compare", "table", "judge", "video", "image")  # what is done instead of an evaluation
# Flags that change no record: everything else is part of the provenance of results.
NOT_IN_RECORDS = (
    *MODES, "model", "data", "benchmarks", "output_dir", "preset", "num_workers", "overwrite",
    "sharded_generation", "prompt_template", "question", "options",
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
    preset: str = flag("", "settings of the paper (Sec. 4.1)", choices=("", *PRESETS))
    order: str = flag("ordered", f"order of the frames, or several: {','.join(ORDERS)}")
    max_pixels: int = flag(256 * 28 * 28, "pixels of a video frame at most (Sec. 4.1)")
    batch_size: int = flag(8, "items that are generated together, per rank", low=1)
    max_new_tokens: int = flag(768, "length of a response at most, in tokens (App. D)", low=1)
    temperature: float = flag(0.01, "divides the logits (Sec. 4.1)", above=0)
    top_p: float = flag(
        0.001, "sample from the most likely tokens of this mass (Sec. 4.1)", above=0, high=1
    )
    seed: int = flag(0, "of the shuffles and of the sampling", low=0)
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
    modes = [name for name in MODES if name in given]
    require(len(modes) <= 1, f"--{' and --'.join(modes)} exclude each other")
    if not (modes or "benchmarks" in given):
        config, is_toy = parse_config(EvalConfig, TOY_DEFAULTS, REAL_COMMAND, argv)
    else:  # parse_config takes --model with --data, or neither; here other flags name the input
        name = [*modes, "benchmarks"][0]
        require("data" not in given, f"--data and --{name} exclude each other")
        needs_model = name in ("benchmarks", "video", "image")
        require("model" in given or not needs_model, f"--{name} needs --model")
        missing = {"model", "data"} - given
        argv = [*argv, *(word for name in missing for word in (f"--{name}", "-"))]
        config, is_toy = parse_config(EvalConfig, {}, REAL_COMMAND, argv)
        config.data = []
    for name in given & {*MODES, "model", "data", "benchmarks", "output_dir", "question"}:
        value = getattr(config, name)
        require(all([value] if isinstance(value, str) else value), f"--{name} is empty")
    if config.benchmarks:
        config.data = find_benchmarks(config)
    for name, value in PRESETS.get(config.preset, {}).items():
        if name not in given:
            setattr(config, name, value)
        elif getattr(config, name) != value:
            log(f"--{name} {getattr(config, name)} wins over the {value} of --preset "
                f"{config.preset}")  # fmt: skip
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
    made_by = provenance(config, NOT_IN_RECORDS, world, template)
    folder = results_folder(config)
    known = {"path": model_path(config.model), "fingerprint": made_by["model_fingerprint"]}
    main_does(world, lambda: check_model(folder / "model.json", known))
    orders, results = config.order.split(","), {}
    for path in config.data:
        batches = fixed_batches(samples[path], config.batch_size)
        for order in orders:
            results[path, order] = Results(
                folder, f"{Path(path).stem}.{order}",
                made_by | {"order": order, "data_sha256": file_sha256(path)}, world, batches,
                {"model_fingerprint"}, config.overwrite, partial(any_decodes, config, batches),
            )  # fmt: skip
    if not all(result.finished for result in results.values()):
        tokenizer = load_tokenizer(config.model)
        prompt_options = {"template": template, **load_normalisation(config.model)}
        model = load_for_answers(config.model, world, config.sharded_generation)
        main_does(world, lambda: write_model(folder / "model.json", known))
    summaries = []
    with DecoderPool(config.num_workers, config.decode_timeout) as pool:
        for (path, order), result in results.items():
            if not result.finished:
                here = replace(config, order=order)
                compute(result, model, tokenizer, pool, prompt_options, here, is_toy)
            if world.is_main:
                summaries.append(read_summary(result.summary_file))
                if not is_toy:
                    print_summary(summaries[-1])
                if order == orders[-1]:
                    write_gaps(folder, Path(path).stem, orders, quiet=is_toy)
    return summaries


def results_folder(config: EvalConfig) -> Path:
    """<output_dir>/<model>, the model's slashes as hyphens."""
    name = config.model.strip("./").replace("/", "--")
    return Path(config.output_dir) / (name or Path(config.model).resolve().name)


def check_model(file: Path, known: dict[str, str]) -> None:
    """Raise UserError if a folder's model.json names another model than the one that is known by
    its path and fingerprint: its name may read the same, as ./m and ../m do."""
    found = read_summary(file)
    if found is None:
        return
    require(found.keys() >= known.keys(), f"{file} does not say whose results these are")
    require(any(found[key] == known[key] for key in known), f"{file.parent} has results of another "
            f"model than {known['path']}, {found['path']}: name another --output_dir")  # fmt: skip


def write_model(file: Path, known: dict[str, str]) -> None:
    """Note whose results a folder holds; a copy of that model leaves the note as it is."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if (read_summary(file) or known)["path"] == known["path"]:
            write_json(file, known)
    except OSError as error:
        raise UserError(f"--output_dir {file.parent.parent}: {error.strerror}") from None


def compute(
    result: Results, model, tokenizer, pool: DecoderPool, prompt_options: dict, config: EvalConfig,
    is_toy: bool,
) -> None:  # fmt: skip
    """Answer the items of one benchmark in one order, this rank its share."""
    benchmark = result.name.rpartition(".")[0]
    settings = AnswerSettings(
        limits=config.limits(), prompt_options=prompt_options, order=config.order,
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
        seed=config.seed,
    )  # fmt: skip
    result.run(
        lambda batches: (
            (number, [item_record(found, config.order) for found in answers])
            for number, answers in answer(model, tokenizer, batches, pool, settings)
        ),
        lambda items: {
            "model": config.model,
            "benchmark": benchmark,
            "order": config.order,
            **summarise(items, is_toy),
            "scores": score_benchmark(benchmark, items),
            "settings": asdict(config),
            "versions": library_versions(),
        },
        in_step=config.sharded_generation,
    )


def answer_one(config: EvalConfig, world: World) -> None:
    """Print the reasoning and the answer to one question about one video or image."""
    kind = "video" if config.video else "image"
    path = config.video or config.image
    require(Path(path).is_file(), f"--{kind} {path} is not a file")
    require(config.question.strip(), f"--{kind} needs --question")
    sample = Sample(
        problem_id=0, problem=config.question, data_type=kind, options=tuple(config.options),
        problem_type="multiple choice" if config.options else "free-form", solution="", path=path,
        data_source="", process="", row=0,
    )  # fmt: skip
    template = load_template(config.prompt_template)
    options = {"template": template, **load_normalisation(config.model)}
    tokenizer = load_tokenizer(config.model)
    with DecoderPool(1, config.decode_timeout) as pool:
        frames = submit_decode(pool, sample, config.limits()).result()
    prompt = make_prompt(sample, tokenizer, frames, **options)
    model = load_for_answers(config.model, world, config.sharded_generation)
    require_room(prompt, config.max_new_tokens, model.config)
    # On every rank, since sharded weights need them all.
    (rollout,) = sample_groups(
        model, tokenizer, [prompt], [[(config.seed, 0)]], config.max_new_tokens,
        config.temperature, config.top_p,
    )  # fmt: skip
    text = rollout.texts[0]
    found = extract_answer(text)
    if found is None:
        cut = "" if rollout.ended[0] else f", cut at --max_new_tokens {config.max_new_tokens}"
        log(f"The response has no <answer>..</answer>{cut}:\n{text}")
    else:
        thought = text.rpartition("<answer>")[0].replace("<think>", "").replace("</think>", "")
        log(f"Reasoning: {thought.strip()}\n\nAnswer: {found}")


def evaluate_toy(config: EvalConfig, world: World) -> None:
    """The toy's test set for SFT and RL, and a table."""
    models = {"SFT": toy.SFT / "model", "RL": toy.RL / "model"}
    for stage, folder in models.items():
        require(folder.is_dir(), f"{folder} is not there: run train_{stage.lower()}.py first")
    orders = config.order.split(",")
    has_gap = {"ordered", "shuffled"} <= set(orders)
    lines = ["model   " + "   ".join(f"{order} frames" for order in orders) + "     gap" * has_gap]
    for stage, folder in models.items():
        summaries = evaluate(replace(config, model=str(folder)), world, is_toy=True)
        found = {summary["order"]: 100 * summary["accuracy"] for summary in summaries}
        cells = [f"{accuracy:{len(order) + 7}.1f}" for order, accuracy in found.items()]
        if has_gap and found:
            cells.append(f"{found['ordered'] - found['shuffled']:+5.1f}")
        lines.append(f"{stage:5}   {'   '.join(cells)}")
    if world.is_main:
        count = summaries[0]["n"]
        print(f"\nThe toy's test set: accuracy in percent over {count} video questions\n")
        print("\n".join(lines))


def main() -> None:
    config, is_toy = parse_command(sys.argv[1:])
    if config.table:
        return print_table(config.table)
    if config.compare:
        require(len(config.compare) == 2, "--compare takes two results files or two folders")
        return compare(*config.compare)
    with process_group(PATIENCE) as world:
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
