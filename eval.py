"""Evaluation: accuracy of a model on benchmark files, in one of several orders of frames.

    python eval.py                              the toy: SFT and RL model, ordered and shuffled
    torchrun --nproc_per_node 8 eval.py --model runs/rl/model --data Evaluation/eval_mvbench.json \\
        --max_frames 32

Decoding is the paper's (Section 4.1): temperature 0.01 and top_p 0.001, which is all but greedy.
Multiple choice and numerical items count as accuracy, regression as mean relative accuracy (MRA,
as VSI-Bench defines it), OCR and free-form by their rewards of Section 3.1.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import toy
from config import MediaConfig, flag, parse_config, require
from data import (
    ORDERS,
    DecoderPool,
    Sample,
    load_samples,
    load_template,
    make_prompt,
    require_no_vision_tokens,
    submit_decode,
)
from distributed import World, gather_to_main, log, main_does, process_group, run
from model import load_model, load_normalisation, load_tokenizer, require_room
from rewards import accuracy_reward, check_solution, extract_answer, parse_float
from sampling import derive_seed, sample_groups

REAL_COMMAND = (
    "torchrun --nproc_per_node 8 eval.py --model runs/rl/model "
    "--data Evaluation/eval_mvbench.json --max_frames 32"
)


@dataclass
class EvalConfig(MediaConfig):
    """Flags of the evaluation."""

    model: str = flag("", "model folder or Hub id; without --model and --data: the toy")
    data: list[str] = flag([], "data files in the official format")
    data_root: str = flag("", "what the rows' paths are relative to; default: each file's folder")
    output_dir: str = flag("runs/eval", "where the results go")
    order: str = flag("ordered", f"order of the frames: {', '.join(ORDERS)}")
    max_pixels: int = flag(256 * 28 * 28, "pixels of a video frame at most (Sec. 4.1)")
    batch_size: int = flag(8, "items that are generated together, per rank")
    max_new_tokens: int = flag(768, "length of a response at most, in tokens (App. D)")
    temperature: float = flag(0.01, "divides the logits (Sec. 4.1)")
    top_p: float = flag(0.001, "sample from the most likely tokens of this mass (Sec. 4.1)")
    seed: int = flag(0, "of the shuffles and of the sampling")

    def check(self) -> None:
        """Raises ValueError naming the first flag whose value makes no sense."""
        self.check_media()
        require(self.order in (*ORDERS, BOTH_ORDERS), f"--order takes one of {', '.join(ORDERS)}")
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


# --------------------------------------------------------------------------------------- metrics


def mean_relative_accuracy(answer: float, reference: float) -> float:
    """VSI-Bench's MRA: the share of theta in {0.50, 0.55, .., 0.95} with error / g <= 1 - theta.

    >>> mean_relative_accuracy(8.0, 10.0)
    0.7
    """
    if reference == 0:
        return float(answer == 0)
    error = abs(answer - reference) / abs(reference)
    # An error of exactly 1 - theta counts; 1e-9 is for decimals that are no binary fractions.
    return sum(error <= (10 - step) / 20 + 1e-9 for step in range(10)) / 10


def score_item(response: str, sample: Sample) -> float:
    """The score of a response in [0, 1]: MRA for regression, else the reward of Section 3.1."""
    if sample.problem_type != "regression":
        return accuracy_reward(response, sample.solution, sample.problem_type)
    answer = parse_float(extract_answer(response) or "")
    reference = parse_float(extract_answer(sample.solution) or sample.solution)
    if answer is None or reference is None:
        return 0.0
    return mean_relative_accuracy(answer, reference)


def summarise(items: list[dict], is_toy: bool) -> dict:
    """Accuracy, by type and overall. Items that cannot be used have no score and are listed.

    accuracy: over multiple choice and numerical items that could be shown to the model. The toy's
    is over video multiple choice, since images do not feel the order of frames.
    """

    def in_accuracy(item: dict) -> bool:
        if is_toy:
            return item["problem_type"] == "multiple choice" and item["data_type"] == "video"
        return item["problem_type"] in ("multiple choice", "numerical")

    def mean(chosen: list[dict]) -> float | None:
        scores = [item["score"] for item in chosen]
        return sum(scores) / len(scores) if scores else None

    usable = [item for item in items if item["score"] is not None]
    types = sorted({item["problem_type"] for item in usable})
    by_type = {kind: [item for item in usable if item["problem_type"] == kind] for kind in types}
    counted = [item for item in usable if in_accuracy(item)]
    return {
        "n": len(counted),
        "accuracy": mean(counted),
        "by_type": {
            kind: {"n": len(those), "score": mean(those)} for kind, those in by_type.items()
        },
        "num_items": len(items),
        "unusable": [
            {key: item[key] for key in ("row", "problem_id", "error")}
            for item in items
            if item["score"] is None
        ],
    }


# ------------------------------------------------------------------------------------ evaluation


def evaluate(config: EvalConfig, world: World, is_toy: bool) -> list[dict]:
    """Evaluate one model on every data file; returns the summaries, on rank 0 (else empty)."""
    # Everything that can be wrong with flags and files shows before the first item.
    benchmarks = [(Path(path).stem, load_samples(path, config.data_root or None))
                  for path in config.data]  # fmt: skip
    tokenizer = load_tokenizer(config.model)
    prompt_options = {"template": load_template(config.prompt_template),
                      **load_normalisation(config.model)}  # fmt: skip
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    model = load_model(config.model, world.device, dtype).eval()
    summaries = []
    for name, samples in benchmarks:
        title = f"{name} {config.order}"
        with tqdm(
            total=len(samples), desc=title, unit="item", disable=not world.is_main,
            dynamic_ncols=True,
        ) as bar:  # fmt: skip
            items = answer_samples(model, tokenizer, samples, config, world, prompt_options, bar)
        gathered = gather_to_main(items, world)
        if gathered:
            items = sorted((item for part in gathered for item in part), key=lambda i: i["row"])
            summary = {
                "model": config.model,
                "benchmark": name,
                "order": config.order,
                **summarise(items, is_toy),
                "settings": dataclasses.asdict(config),
            }
            write_results(config, name, items, summary)
            summaries.append(summary)
    return summaries


def answer_samples(
    model, tokenizer, samples: list[Sample], config: EvalConfig, world: World,
    prompt_options: dict, bar: tqdm,
) -> list[dict]:  # fmt: skip
    """This rank's items. Batches are cut before they are dealt out, so that the number of ranks
    does not change which items share a batch."""
    cuts = range(0, len(samples), config.batch_size)
    mine = [samples[cut : cut + config.batch_size] for cut in cuts][world.rank :: world.size]
    items = []
    with DecoderPool(config.num_workers, config.decode_timeout) as pool:
        waiting = [[submit_decode(pool, s, config.limits()) for s in batch] for batch in mine[:2]]
        for number, batch in enumerate(mine):
            if number + 2 < len(mine):  # two batches are decoded ahead
                waiting.append([submit_decode(pool, s, config.limits()) for s in mine[number + 2]])
            prompts = []
            for sample, future in zip(batch, waiting[number], strict=True):
                try:
                    check_solution(sample.solution, sample.problem_type)
                    require_no_vision_tokens(sample)
                    generator = torch.Generator().manual_seed(derive_seed(config.seed, sample.row))
                    prompt = make_prompt(sample, tokenizer, future.result(), config.order,
                                         generator, **prompt_options)  # fmt: skip
                    require_room(prompt, config.max_new_tokens, model.config)
                    prompts.append(prompt)
                except ValueError as error:  # MediaError too: in the summary, and in no score
                    items.append(item_record(sample, config.order, error=str(error)))
            waiting[number] = None
            if prompts:
                keys = [[(config.seed, prompt.sample.row, 1)] for prompt in prompts]
                rollouts = sample_groups(model, tokenizer, prompts, keys, config.max_new_tokens,
                                         config.temperature, config.top_p)  # fmt: skip
                items += [item_record(r.prompt.sample, r.prompt.order, r) for r in rollouts]
            bar.update(min(len(batch) * world.size, bar.total - bar.n))
    return items


def item_record(sample: Sample, order: str, rollout=None, error: str | None = None) -> dict:
    """One line of the results: an item, its response and its score (null: unusable media)."""
    record = {
        "row": sample.row, "problem_id": sample.problem_id, "data_type": sample.data_type,
        "problem_type": sample.problem_type, "data_source": sample.data_source, "order": order,
        "solution": sample.solution, "error": error, "response": None, "answer": None,
        "length": None, "ended": None, "score": None,
    }  # fmt: skip
    if rollout is not None:
        text = rollout.texts[0]
        record |= {
            "response": text, "answer": extract_answer(text), "length": int(rollout.lengths[0]),
            "ended": bool(rollout.ended[0]), "score": score_item(text, sample),
        }  # fmt: skip
    return record


def write_results(config: EvalConfig, name: str, items: list[dict], summary: dict) -> None:
    """<output_dir>/<model>/<benchmark>.<order>.jsonl and .summary.json, each whole or not there."""
    folder = Path(config.output_dir) / config.model.strip("./").replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        f"{name}.{config.order}.jsonl": "".join(json.dumps(item) + "\n" for item in items),
        f"{name}.{config.order}.summary.json": json.dumps(summary, indent=2) + "\n",
    }
    for file_name, text in texts.items():
        unfinished = folder / f".{file_name}"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, folder / file_name)
    log(f"results written to {folder / name}.{config.order}.*")


def print_table(summaries: list[dict]) -> None:
    """One row per benchmark: accuracy, and the score of each problem type, in percent."""
    for summary in summaries:
        parts = [f"{kind} {100 * part['score']:.1f} ({part['n']})"
                 for kind, part in summary["by_type"].items()]  # fmt: skip
        accuracy = "-" if summary["accuracy"] is None else f"{100 * summary['accuracy']:.1f}"
        print(f"\n{summary['benchmark']}, {summary['order']} frames: accuracy {accuracy} over "
              f"{summary['n']} items; by type: {', '.join(parts)}")  # fmt: skip
        if summary["unusable"]:
            print(f"  {len(summary['unusable'])} items cannot be used and are in no score; the "
                  "summary lists them")  # fmt: skip


def evaluate_toy(config: EvalConfig, world: World) -> None:
    """The toy's test set, in both orders if no --order is given, for SFT and RL, and a table."""
    models = {"SFT": toy.SFT / "model", "RL": toy.RL / "model"}
    for stage, folder in models.items():
        require(folder.is_dir(), f"{folder} is not there: run train_{stage.lower()}.py first")
    accuracies = {}
    for stage, folder in models.items():
        for order in config.order.split(","):
            here = dataclasses.replace(config, model=str(folder), order=order)
            for summary in evaluate(here, world, is_toy=True):
                accuracies[stage, order] = 100 * summary["accuracy"]
                count = summary["n"]
    if not world.is_main:
        return
    print(f"\nThe toy's test set: accuracy in percent over {count} video questions\n")
    if config.order != BOTH_ORDERS:
        print(f"model   {config.order} frames")
        for stage in models:
            print(f"{stage:5}   {accuracies[stage, config.order]:{len(config.order) + 7}.1f}")
        return
    print("model   ordered frames   shuffled frames     gap")
    for stage in models:
        ordered, shuffled = accuracies[stage, "ordered"], accuracies[stage, "shuffled"]
        print(f"{stage:5}   {ordered:14.1f}   {shuffled:15.1f}   {ordered - shuffled:+5.1f}")


def main() -> None:
    config, is_toy = parse_config(EvalConfig, TOY_DEFAULTS, REAL_COMMAND)
    with process_group() as world:
        config.check()
        require(is_toy or config.order in ORDERS, f"--order takes one of {', '.join(ORDERS)}")
        if is_toy:
            log(f"the embedded toy (neither --model nor --data given); a real run: {REAL_COMMAND}")
            main_does(world, toy.ensure_toy)
            evaluate_toy(config, world)
        else:
            print_table(evaluate(config, world, is_toy=False))


if __name__ == "__main__":
    run(main)
