"""CoT annotation (Section 3.1): rationales of a teacher for the rows of an RL data set, filtered.

    torchrun --nproc_per_node 8 annotate.py --model Qwen/Qwen2.5-VL-72B-Instruct \\
        --data Video-R1-data/Video-R1-260k.json --out Video-R1-data/COT.json \\
        --sharded_generation true
    torchrun --standalone --nproc_per_node 2 annotate.py                      the embedded toy

Each row is answered --num_samples times with the prompt of both training stages (App. C.1). The
paper keeps what passes "basic rule-based filtering to remove low-quality or inconsistent outputs"
and says no more. The rules here, in this order:

    format      <think>..</think><answer>..</answer>, a thought, no control token spelled out
    accuracy    correctness reward of Section 3.1 at least --min_accuracy
    length      --min_length to --max_length tokens, tags and end token included
    repetition  at most --max_repetition of the runs of 8 tokens have occurred before

The best try of a row is the one that gets furthest through the rules, so any that passes wins; then
the one of higher correctness; then the first. (No preference in length: it would shift what the
teacher says.) A row whose best try breaks a rule is dropped, and counted under that rule.

Written is the row as it was, its own solution included, with the teacher's thought as `process`.
The teacher's answer is not written: where it is not the solution in other words (OCR, free-form,
regression) it is worse than the reference, and a model that learns it learns the error.

    <out>                    a JSON list, rows in the file's order: --data of train_sft.py
    <out>.report.json        how many rows were kept and dropped, by rule and by problem type
    <out>.tries.*            every try with what the rules ask of it, and how they were generated

The same command resumes after a kill, on any number of ranks, and ends with the same files
(results.py). With other rules, --overwrite true filters the same tries again.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import toy
from config import MediaConfig
from data import load_samples, load_template, read_rows
from evaluation.answering import (
    PATIENCE,
    Answer,
    AnswerSettings,
    answer,
    any_decodes,
    fixed_batches,
    load_for_answers,
    provenance,
)
from evaluation.results import (
    Results,
    file_sha256,
    is_made_by,
    library_versions,
    read_records,
    read_summary,
    write_json,
    write_whole,
)
from infra.distributed import World, log, main_does, process_group, run_main
from infra.errors import UserError, require
from infra.flags import flag, parse_config
from infra.video import DecoderPool
from model import load_normalisation, load_tokenizer
from rewards import accuracy_reward, format_reward

REAL_COMMAND = (
    "torchrun --nproc_per_node 8 annotate.py --model Qwen/Qwen2.5-VL-72B-Instruct --data "
    "Video-R1-data/Video-R1-260k.json --out Video-R1-data/COT.json --sharded_generation true"
)
RULES = ("format", "accuracy", "length", "repetition")
RULE_FLAGS = ("min_accuracy", "min_length", "max_length", "max_repetition")
# Flags that change no try: all others are part of its provenance.
NOT_IN_TRIES = (
    *RULE_FLAGS, "model", "data", "out", "overwrite", "num_workers", "sharded_generation",
    "prompt_template",
)  # fmt: skip
RUN_LENGTH = 8  # tokens of a run that may be repeated
# Qwen's control tokens, <|im_start|>, <|image_pad|> and so on: as text they would become tokens.
CONTROL_TOKEN = re.compile(r"<\|\w+\|>")


@dataclass
class AnnotateConfig(MediaConfig):
    """Flags of the annotation."""

    model: str = flag("", "the teacher, a model folder or Hub id; without --model and --data: toy")
    data: str = flag("", "data file, JSON list or JSON lines in the official RL format")
    data_root: str = flag("", "what the rows' paths are relative to; default: the data's folder")
    out: str = flag("", "the file to write, a JSON list in the official SFT format")
    overwrite: bool = flag(False, "replace what other settings made in the place of --out")
    num_samples: int = flag(4, "tries per row", low=1)
    batch_size: int = flag(8, "rows that are answered together, per rank", low=1)
    max_new_tokens: int = flag(768, "length of a try at most, in tokens (App. D)", low=1)
    temperature: float = flag(1.0, "divides the logits", above=0)
    top_p: float = flag(1.0, "sample from the most likely tokens of this mass", above=0, high=1)
    seed: int = flag(0, "of the sampling", low=0)
    sharded_generation: bool = flag(False, "for a teacher that does not fit one GPU; slow")
    # Official code: one try, and a reward above 0.6.
    min_accuracy: float = flag(
        0.6, "correctness reward at least (0.6: the official code)", low=0, high=1
    )
    min_length: int = flag(32, "tokens of a response at least; tags and a letter are 10", low=0)
    max_length: int = flag(768, "tokens of a response at most (App. D)")
    max_repetition: float = flag(
        0.3, f"share of repeated runs of {RUN_LENGTH} tokens at most", low=0, high=1
    )

    def check(self) -> None:
        """Raise UserError naming the first flag whose value makes no sense."""
        super().check()
        require(self.min_length <= self.max_length, "--min_length is above --max_length")
        require(self.out, "--out FILE.json is needed")
        out = Path(self.out)
        require(not out.is_dir(), f"--out {out} is a folder")
        require(out.resolve() != Path(self.data).resolve(), "--out and --data are the same file")


TOY_DEFAULTS = {
    "model": str(toy.RL / "model"), "data": str(toy.RL_DATA), "out": str(toy.FOLDER / "cot.json"),
    "max_frames": toy.NUM_FRAMES, "batch_size": 32, "max_new_tokens": 40, "min_length": 8,
    "overwrite": True,  # a toy that is trained again is annotated again
}  # fmt: skip


# ---------------------------------------------------------------------------------------- filter


def repeated_share(tokens: Sequence[int], length: int = RUN_LENGTH) -> float:
    """The share of runs of `length` tokens, at every place, that have occurred before; in [0, 1).

    >>> repeated_share([1, 2, 3, 1, 2, 4], length=2)  # 12 23 31 (12) 24
    0.2
    """
    runs = [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def broken_rule(attempt: dict, config: AnnotateConfig) -> str | None:
    """The first of RULES that a try of a tries_record breaks; None if it passes all."""
    text = attempt["text"]
    thought = thought_of(text).removeprefix("<think>").removesuffix("</think>")
    well_formed = format_reward(text) and thought.strip() and not CONTROL_TOKEN.search(text)
    passes = {
        "format": bool(well_formed),
        "accuracy": attempt["accuracy"] >= config.min_accuracy,
        "length": config.min_length <= attempt["length"] <= config.max_length,
        "repetition": attempt["repetition"] <= config.max_repetition,
    }
    return next((rule for rule in RULES if not passes[rule]), None)


def thought_of(response: str) -> str:
    """ "<think>..</think>" of a response that has the format."""
    return response.strip().partition("</think>")[0] + "</think>"


def best_try(tries: list[dict], config: AnnotateConfig) -> tuple[dict, str | None]:
    """The try that gets furthest through the rules, then the one of highest correctness, then the
    first; and the rule that it breaks, None if it passes."""
    judged = [(attempt, broken_rule(attempt, config)) for attempt in tries]
    places = [*RULES, None]
    return max(judged, key=lambda pair: (places.index(pair[1]), pair[0]["accuracy"]))


def filter_tries(
    rows: dict[int, dict], records: list[dict], config: AnnotateConfig
) -> tuple[list[dict], dict]:
    """The annotated rows in the file's order, and what became of all rows.

    Args:
        rows: the data file's, by number. records: a tries_record for each, sorted by row.
    Returns:
        the rows to learn from; the counts of tally, "by_type" with the same for each problem type,
        and "unusable_rows".
    """
    kept, unusable, outcomes = [], [], {}
    for record in records:
        outcome = "unusable"
        if record["error"] is None:
            attempt, broken = best_try(record["tries"], config)
            outcome = broken or "kept"
            if not broken:
                kept.append({**rows[record["row"]], "process": thought_of(attempt["text"])})
        else:
            unusable.append({key: record[key] for key in ("row", "problem_id", "error")})
        outcomes.setdefault(record["problem_type"], []).append(outcome)
    report = tally([outcome for those in outcomes.values() for outcome in those])
    report["by_type"] = {kind: tally(outcomes[kind]) for kind in sorted(outcomes)}
    return kept, {**report, "unusable_rows": unusable}


def tally(outcomes: list[str]) -> dict:
    """How many rows there were, were kept, were dropped by each rule, and could not be used."""
    dropped = {rule: outcomes.count(rule) for rule in RULES}
    return {"rows": len(outcomes), "kept": outcomes.count("kept"), "dropped": dropped,
            "unusable": outcomes.count("unusable")}  # fmt: skip


# ------------------------------------------------------------------------------------ generation


def tries_record(found: Answer) -> dict:
    """All tries of a row with what the rules ask of them; none if the row cannot be used."""
    sample, rollout = found.sample, found.rollout
    record = {
        "row": sample.row, "problem_id": sample.problem_id, "problem_type": sample.problem_type,
        "error": found.error, "is_media_error": found.is_media_error, "tries": [],
    }  # fmt: skip
    if rollout is not None:
        columns = rollout.texts, rollout.completion_ids, rollout.completion_mask, rollout.ended
        record["tries"] = [
            {
                "text": text, "length": int(mask.sum()), "ended": bool(ended),
                "accuracy": accuracy_reward(text, sample.solution, sample.problem_type),
                "repetition": repeated_share(ids[mask].tolist()),
            }
            for text, ids, mask, ended in zip(*columns, strict=True)
        ]  # fmt: skip
    return record


def generate(tries: Results, template: str, config: AnnotateConfig) -> None:
    """Answer the batches that are not done, this rank its share, and finish the file of tries."""
    tokenizer = load_tokenizer(config.model)
    settings = AnswerSettings(
        limits=config.limits(), num_samples=config.num_samples, temperature=config.temperature,
        prompt_options={"template": template, **load_normalisation(config.model)},
        max_new_tokens=config.max_new_tokens, top_p=config.top_p, seed=config.seed,
    )  # fmt: skip
    model = load_for_answers(config.model, tries.world, config.sharded_generation)
    with DecoderPool(config.num_workers, config.decode_timeout) as pool:
        tries.run(
            lambda batches: (
                (number, [tries_record(found) for found in answers])
                for number, answers in answer(model, tokenizer, batches, pool, settings)
            ),
            lambda records: {"model": config.model, "data": config.data,
                             "versions": library_versions()},
            in_step=config.sharded_generation, unit="row",
        )  # fmt: skip


def annotate(config: AnnotateConfig, world: World) -> None:
    """Write --out and its report from the tries, which are generated where they are not there.

    Raises:
        UserError: naming the flag, or the file, its row, or what is in the place of --out.
    """
    samples = load_samples(config.data, config.data_root or None)
    template = load_template(config.prompt_template)
    made_by = provenance(config, NOT_IN_TRIES, world, template)
    made_by["data_sha256"] = file_sha256(config.data)
    rules = {name: value for name, value in asdict(config).items() if name in RULE_FLAGS}
    out = Path(config.out)
    main_does(world, lambda: make_room(out, made_by | rules, config.overwrite))
    batches = fixed_batches(samples, config.batch_size)
    tries = Results(
        out.parent, f"{out.name}.tries", made_by, world, batches, overwrite=config.overwrite,
        retry=partial(any_decodes, config, batches),
    )  # fmt: skip
    if not tries.finished:
        generate(tries, template, config)
    if world.is_main:
        write(out, tries, made_by | rules, config)
        print_report(config, read_summary(report_file(out)))


def report_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.report.json")


def make_room(out: Path, made_by: dict, overwrite: bool) -> None:
    """Raise UserError unless --out can be written, and replaces nothing that it must not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    if out.exists():
        require(overwrite or report_file(out).exists(), f"{out} has no report of what made it: "
                "name another --out, or replace it by --overwrite true")  # fmt: skip
        is_made_by(report_file(out), made_by, overwrite=overwrite)


def write(out: Path, tries: Results, made_by: dict, config: AnnotateConfig) -> None:
    """Filter the tries into --out and its report. On rank 0.

    The report comes first: where --out is, it is whole and has its report.
    """
    rows, _ = read_rows(Path(config.data))
    kept, report = filter_tries(rows, read_records(tries.records_file), config)
    about = read_summary(tries.summary_file) | {"provenance": made_by}
    write_json(report_file(out), {**report, **about})
    write_whole(out, json.dumps(kept, indent=1) + "\n")


def print_report(config: AnnotateConfig, report: dict) -> None:
    """The counts as a table, and how to train on what was written."""
    columns = ("rows", "kept", *RULES, "unusable")
    log(f"\n{config.out}: rows kept, and dropped by the rule that the best try breaks\n")
    log(f"{'':15}{''.join(f'{name:>11}' for name in columns)}")
    for kind, part in {**report["by_type"], "all": report}.items():
        cells = [{**part, **part["dropped"]}[name] for name in columns]
        log(f"{kind:15}{''.join(f'{cell:11}' for cell in cells)}")
    root = Path(config.data_root) if config.data_root else Path(config.data).parent
    is_elsewhere = root.resolve() != Path(config.out).parent.resolve()
    where = f" --data_root {root}" if is_elsewhere else ""
    use = f"to train on it: train_sft.py --data {config.out}{where}"
    log(f"\n{use if report['kept'] else 'no row was kept: there is nothing to train on'}")


def main() -> None:
    config, is_toy = parse_config(AnnotateConfig, TOY_DEFAULTS, REAL_COMMAND)
    config.check()
    with process_group(PATIENCE) as world:
        if is_toy:
            log(f"the embedded toy (neither --model nor --data given); a real run: {REAL_COMMAND}")
            main_does(world, toy.ensure_toy)
            require(Path(config.model).is_dir(), f"{config.model} is not there: run train_rl.py")
        annotate(config, world)


if __name__ == "__main__":
    run_main(main)
