"""Evaluation: scores of a model on benchmark files, in one or several orders of frames.

    python eval.py                              the toy: SFT and RL model, ordered and shuffled
    torchrun --nproc_per_node 8 eval.py --model runs/rl/model --data Evaluation/eval_mvbench.json \\
        --max_frames 32
    torchrun --nproc_per_node 8 eval.py --model runs/rl/model --benchmarks mvbench,vsibench \\
        --data_root Video-R1-eval --preset paper-16 --order ordered,shuffled
    python eval.py --table runs/eval            Table 1 from the summaries below a folder
    python eval.py --compare runs/eval/a runs/eval/b         paired differences, a minus b
    python eval.py --judge JUDGE_MODEL RESULTS.jsonl         Section 4.5, Figure 6 (judge.py)
    python eval.py --model runs/rl/model --video clip.mp4 --question "What happens?"

Decoding is the paper's (Section 4.1): temperature 0.01 and top_p 0.001, which is all but greedy.
`accuracy` is over multiple choice and numerical items that could be shown; `scores` are those of
the benchmark's authors and of the paper's (scores.py). An evaluation that was cut off goes on where
it was when the same command is given again, on any number of ranks (results.py).
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import toy
from config import MediaConfig
from data import ORDERS, Sample, load_samples, load_template, make_prompt
from evaluation.answering import (
    AnswerSettings,
    answer,
    fixed_batches,
    item_record,
    load_for_answers,
    score_item,
    summarise,
)
from evaluation.judge import judge
from evaluation.report import compare, print_summary, print_table, write_gaps
from evaluation.results import (
    Results,
    file_sha256,
    fingerprint,
    library_versions,
    read_summary,
)
from evaluation.scores import BENCHMARKS, mean_relative_accuracy, score_benchmark
from infra.distributed import World, log, main_does, on_main, process_group, run_main
from infra.errors import require
from infra.flags import flag, parse_config
from infra.video import DecoderPool
from model import load_normalisation, load_tokenizer, require_room
from rewards import extract_answer
from sampling import sample_groups

__all__ = ["EvalConfig", "evaluate", "mean_relative_accuracy", "score_item", "summarise"]

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
# Flags that change no record: everything else is part of a results file's provenance.
NOT_IN_RECORDS = (
    "model", "data", "benchmarks", "output_dir", "preset", "num_workers", "overwrite", "compare",
    "sharded_generation", "prompt_template", "table", "judge", "video", "image", "question",
    "options",
)  # fmt: skip
MODES = ("compare", "table", "judge", "video", "image")  # what is done in place of an evaluation
# Seconds that a rank waits at the end of a file for others, whose clips may be longer.
PATIENCE = 6 * 3600


@dataclass
class EvalConfig(MediaConfig):
    """Flags of the evaluation."""

    model: str = flag("", "model folder or Hub id; without --model and --data: the toy")
    data: list[str] = flag([], "data files in the official format")
    benchmarks: str = flag("", f"in place of --data: {','.join(NAMES)}, found below --data_root")
    data_root: str = flag("", "what the rows' paths are relative to; default: each file's folder")
    output_dir: str = flag("runs/eval", "where the results go")
    overwrite: bool = flag(False, "replace results that are there, whatever made them")
    preset: str = flag("", f"settings of the paper (Sec. 4.1): {', '.join(PRESETS)}")
    order: str = flag("ordered", f"order of the frames, or several: {','.join(ORDERS)}")
    max_pixels: int = flag(256 * 28 * 28, "pixels of a video frame at most (Sec. 4.1)")
    batch_size: int = flag(8, "items that are generated together, per rank")
    max_new_tokens: int = flag(768, "length of a response at most, in tokens (App. D)")
    temperature: float = flag(0.01, "divides the logits (Sec. 4.1)")
    top_p: float = flag(0.001, "sample from the most likely tokens of this mass (Sec. 4.1)")
    seed: int = flag(0, "of the shuffles and of the sampling")
    sharded_generation: bool = flag(False, "for a model that one GPU does not hold whole; slow")
    compare: list[str] = flag([], "two results files or folders: the paired difference A - B")
    table: list[str] = flag([], "folders with summaries: Table 1 in Markdown")
    judge: list[str] = flag([], "a judge model, then results files (Sec. 4.5)")
    video: str = flag("", "one clip to ask --question about")
    image: str = flag("", "one picture to ask --question about")
    question: str = flag("", "with --video or --image")
    options: list[str] = flag([], 'of a multiple-choice --question: "A. left" "B. right"')

    def check(self) -> None:
        """Raises UserError naming the first flag whose value makes no sense."""
        super().check()
        orders = self.order.split(",")
        known = set(orders) <= set(ORDERS) and len(set(orders)) == len(orders)
        require(known, f"--order takes one or several of {','.join(ORDERS)}, not {self.order!r}")
        for name in ("batch_size", "max_new_tokens"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        require(self.seed >= 0, "--seed must not be negative")
        require(self.temperature > 0, "--temperature must be positive")
        require(0 < self.top_p <= 1, "--top_p must be above 0 and at most 1")
        names = [Path(path).stem for path in self.data]
        require(
            len(set(names)) == len(names),
            f"--data names two files of one name, whose results would be one: {', '.join(names)}",
        )
        folder = Path(self.output_dir)
        require(not folder.exists() or folder.is_dir(), f"--output_dir {folder} is no folder")


BOTH_ORDERS = "ordered,shuffled"  # of the toy, where --order is not given
TOY_DEFAULTS = {
    "order": BOTH_ORDERS,
    "model": str(toy.SFT / "model"), "data": [str(toy.TEST_DATA)],
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
        missing = [name for name in ("model", "data") if name not in given]
        argv = [*argv, *(word for name in missing for word in (f"--{name}", "-"))]
        config, is_toy = parse_config(EvalConfig, {}, REAL_COMMAND, argv)
        config.data = find_benchmarks(config) if config.benchmarks else []
    require(not config.preset or config.preset in PRESETS,
            f"--preset takes one of {', '.join(PRESETS)}, not {config.preset!r}")  # fmt: skip
    for name, value in PRESETS.get(config.preset, {}).items():
        if name not in given:
            setattr(config, name, value)
        elif getattr(config, name) != value:
            log(f"--{name} {getattr(config, name)} wins over the {value} of --preset "
                f"{config.preset}")  # fmt: skip
    return config, is_toy


def find_benchmarks(config: EvalConfig) -> list[str]:
    """The files of --benchmarks: eval_<name>.json in --data_root or in its folder Evaluation."""
    require(config.data_root, "--benchmarks needs --data_root, the folder that holds eval_*.json")
    files = []
    for name in config.benchmarks.split(","):
        require(name in NAMES, f"--benchmarks knows {', '.join(NAMES)}, not {name!r}")
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
    files = {Path(path).stem: path for path in config.data}
    samples = {name: load_samples(path, config.data_root or None) for name, path in files.items()}
    template = load_template(config.prompt_template)
    hashes = on_main(world, lambda: {
        "model_fingerprint": fingerprint(config.model),
        "data_sha256": {name: file_sha256(path) for name, path in files.items()},
    })  # fmt: skip
    orders, results = config.order.split(","), {}
    for name in files:
        for order in orders:
            here = dataclasses.replace(config, order=order)
            provenance = provenance_of(here, world, template) | hashes
            provenance["data_sha256"] = hashes["data_sha256"][name]
            results[name, order] = Results(
                results_folder(config), f"{name}.{order}", provenance, world, config.overwrite
            )
    if not all(result.finished for result in results.values()):
        tokenizer = load_tokenizer(config.model)
        prompt_options = {"template": template, **load_normalisation(config.model)}
        model = load_for_answers(config.model, world, config.sharded_generation)
    summaries = []
    with DecoderPool(config.num_workers, config.decode_timeout) as pool:
        for (name, order), result in results.items():
            if not result.finished:
                here = dataclasses.replace(config, order=order)
                settings = answer_settings(here, prompt_options)
                answer_all(model, tokenizer, samples[name], result, pool, settings, here, is_toy)
            if world.is_main:
                summaries.append(read_summary(result.summary_file))
                if not is_toy:
                    print_summary(summaries[-1])
                if order == orders[-1]:
                    write_gaps(results_folder(config), name, orders, quiet=is_toy)
    return summaries


def results_folder(config: EvalConfig) -> Path:
    """<output_dir>/<model>, the model's slashes as hyphens."""
    return Path(config.output_dir) / config.model.strip("./").replace("/", "--")


def provenance_of(config: EvalConfig, world: World, template: str) -> dict:
    """What the records depend on, but for the hashes of model and data."""
    settings = dataclasses.asdict(config)
    kept = {name: value for name, value in settings.items() if name not in NOT_IN_RECORDS}
    return {**kept, "template": template, "device": f"{world.device.type} {world.dtype}"}


def answer_settings(config: EvalConfig, prompt_options: dict) -> AnswerSettings:
    """What answer needs of the flags."""
    return AnswerSettings(
        limits=config.limits(), prompt_options=prompt_options, order=config.order,
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
        seed=config.seed,
    )  # fmt: skip


def answer_all(
    model, tokenizer, samples: list[Sample], result: Results, pool: DecoderPool,
    settings: AnswerSettings, config: EvalConfig, is_toy: bool,
) -> None:  # fmt: skip
    """Answer the batches that are not done, this rank its part, and finish the results file."""
    world, benchmark = result.world, result.name.rpartition(".")[0]
    batches = fixed_batches(samples, config.batch_size)
    result.begin()
    mine = result.deal(batches, in_step=config.sharded_generation)
    with tqdm(
        total=len(samples), initial=sum(len(batches[number]) for number in result.done),
        desc=f"{benchmark} {config.order}", unit="item", disable=not world.is_main,
        dynamic_ncols=True,
    ) as bar:  # fmt: skip
        for number, answers in answer(model, tokenizer, mine, pool, settings):
            result.append(number, [item_record(found, config.order) for found in answers])
            world.watch.at(f"{result.name}, behind batch {number}")
            bar.update(min(len(answers) * world.size, bar.total - bar.n))
    result.finish(lambda items: {
        "model": config.model,
        "benchmark": benchmark,
        "order": config.order,
        **summarise(items, is_toy),
        "scores": score_benchmark(benchmark, items),
        "settings": dataclasses.asdict(config),
        "versions": library_versions(),
    })  # fmt: skip


def answer_one(config: EvalConfig, world: World) -> None:
    """Print the reasoning and the answer to one question about one clip or picture."""
    kind = "video" if config.video else "image"
    path = getattr(config, kind)
    require(Path(path).is_file(), f"--{kind} {path} is no file")
    require(config.question.strip(), f"--{kind} needs --question")
    sample = Sample(
        problem_id=0, problem=config.question, data_type=kind, options=tuple(config.options),
        problem_type="multiple choice" if config.options else "free-form", solution="", path=path,
        data_source="", process="", row=0,
    )  # fmt: skip
    template = load_template(config.prompt_template)
    options = {"template": template, **load_normalisation(config.model)}
    tokenizer = load_tokenizer(config.model)
    limits = {"min_pixels": config.min_pixels, "max_pixels": config.image_max_pixels}
    if config.video:
        limits |= {"max_pixels": config.max_pixels, "max_frames": config.max_frames}
    with DecoderPool(1, config.decode_timeout) as pool:
        frames = pool.submit(kind, path, **limits).result()
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
    """The toy's test set, in both orders if no --order is given, for SFT and RL, and a table."""
    models = {"SFT": toy.SFT / "model", "RL": toy.RL / "model"}
    for stage, folder in models.items():
        require(folder.is_dir(), f"{folder} is not there: run train_{stage.lower()}.py first")
    accuracies = {}
    for stage, folder in models.items():
        here = dataclasses.replace(config, model=str(folder))
        for summary in evaluate(here, world, is_toy=True):
            accuracies[stage, summary["order"]] = 100 * summary["accuracy"]
            count = summary["n"]
    if not world.is_main:
        return
    print(f"\nThe toy's test set: accuracy in percent over {count} video questions\n")
    if config.order != BOTH_ORDERS:
        orders = config.order.split(",")
        print(f"model   {'   '.join(f'{order} frames' for order in orders)}")
        for stage in models:
            cells = [f"{accuracies[stage, order]:{len(order) + 7}.1f}" for order in orders]
            print(f"{stage:5}   {'   '.join(cells)}")
        return
    print("model   ordered frames   shuffled frames     gap")
    for stage in models:
        ordered, shuffled = accuracies[stage, "ordered"], accuracies[stage, "shuffled"]
        print(f"{stage:5}   {ordered:14.1f}   {shuffled:15.1f}   {ordered - shuffled:+5.1f}")


def main() -> None:
    config, is_toy = parse_command(sys.argv[1:])
    if config.table:
        return print_table(config.table)
    if config.compare:
        require(len(config.compare) == 2, "--compare takes two results files or two folders")
        return compare(*config.compare)
    with process_group(PATIENCE) as world:
        config.check()
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
