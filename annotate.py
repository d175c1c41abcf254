"""CoT annotation (Section 3.1): rationales of a teacher for the rows of an RL data set, filtered.

    torchrun --nproc_per_node 8 annotate.py --model Qwen/Qwen2.5-VL-72B-Instruct \\
        --data Video-R1-data/Video-R1-260k.json --out Video-R1-data/COT.json \\
        --sharded_generation true
    torchrun --standalone --nproc_per_node 2 annotate.py                      the embedded toy

Each row is answered --num_samples times with the prompt of both training stages (App. C.1). The
paper keeps what passes "basic rule-based filtering to remove low-quality or inconsistent outputs"
and says no more; RULES are ours. The best try of a row is the one that gets furthest through them,
then the one of higher correctness, then the first. A row whose best try breaks a rule is dropped.

Each kept row is written unchanged, with the teacher's reasoning added as `process`. The answer to
learn stays the row's own solution, since the teacher's may be worse (OCR, free-form, regression).

    <out>                    a JSON list, rows in the file's order: --data of train_sft.py
    <out>.report.json        rows kept and dropped, by rule and by problem type; settings
    <out>.tries.*            every try with what the rules ask of it, and how they were generated

The same command resumes, on any number of ranks (results.py). With other rules, --overwrite true
filters the same tries again.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import toy
from config import PRECISIONS, MediaConfig
from data import load_samples, load_template, read_rows
from evaluation.answering import PATIENCE, Answer, fixed_batches, provenance, responder
from evaluation.results import (
    Results,
    file_sha256,
    read_records,
    write_json,
    write_whole,
)
from infra.distributed import World, log, main_does, process_group, run_main
from infra.errors import require
from infra.flags import flag, parse_config
from rewards import accuracy_reward, format_reward

REAL_COMMAND = (
    "torchrun --nproc_per_node 8 annotate.py --model Qwen/Qwen2.5-VL-72B-Instruct --data "
    "Video-R1-data/Video-R1-260k.json --out Video-R1-data/COT.json --sharded_generation true"
)
RULES = {  # what a try must fulfil, in this order
    "format": lambda attempt, config: is_well_formed(attempt["text"]),
    "accuracy": lambda attempt, config: attempt["accuracy"] >= config.min_accuracy,
    "length": lambda attempt, config: config.min_length <= attempt["length"] <= config.max_length,
    "repetition": lambda attempt, config: attempt["repetition"] <= config.max_repetition,
}
OUTCOMES = ("kept", *RULES, "unusable")  # of a row
RULE_FLAGS = ("min_accuracy", "min_length", "max_length", "max_repetition")
# Flags that change no try: all others are part of its provenance.
NOT_IN_TRIES = (
    *RULE_FLAGS, "model", "data", "out", "overwrite", "num_workers", "sharded_generation",
    "prompt_template", "precision",
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
    overwrite: bool = flag(False, "replace --out, and tries that other settings made")
    num_samples: int = flag(4, "tries per row", low=1)
    batch_size: int = flag(8, "rows that are answered together, per rank", low=1)
    max_new_tokens: int = flag(768, "length of a try at most, in tokens (App. D)", low=1)
    temperature: float = flag(1.0, "divides the logits", above=0)
    top_p: float = flag(1.0, "sample from the most likely tokens of this mass", above=0, high=1)
    seed: int = flag(0, "of the sampling", low=0)
    precision: str = flag("", "fp32 or bf16; default: by device", choices=PRECISIONS)
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
        require(out.resolve() != Path(self.data).resolve(), "--out and --data are the same file")
        free = not out.exists() or (self.overwrite and out.is_file())
        require(free, f"--out {out} is there: name another, or replace a file by --overwrite true")


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


def is_well_formed(text: str) -> bool:
    """<think>..</think><answer>..</answer> with a thought, and no control token spelled out."""
    thought = thought_of(text).removeprefix("<think>").removesuffix("</think>")
    return bool(format_reward(text) and thought.strip() and not CONTROL_TOKEN.search(text))


def thought_of(response: str) -> str:
    """ "<think>..</think>" of a response that has the format."""
    return response.strip().partition("</think>")[0] + "</think>"


def broken_rule(attempt: dict, config: AnnotateConfig) -> str | None:
    """The first of RULES that a try of a tries_record breaks; None if it passes all."""
    return next((name for name, passes in RULES.items() if not passes(attempt, config)), None)


def best_try(tries: list[dict], config: AnnotateConfig) -> tuple[dict, str | None]:
    """The best try of a row, and the rule that it breaks; None if it passes."""
    judged = [(attempt, broken_rule(attempt, config)) for attempt in tries]
    places = [*RULES, None]
    return max(judged, key=lambda pair: (places.index(pair[1]), pair[0]["accuracy"]))


def filter_tries(
    rows: dict[int, dict], records: list[dict], config: AnnotateConfig
) -> tuple[list[dict], dict]:
    """The annotated rows in the file's order, and how many rows had each of OUTCOMES.

    Args:
        rows: the data file's, by number. records: a tries_record for each, sorted by row.
    Returns:
        the rows to learn from; {"all" or a problem type: {"rows" or an outcome: number}}.
    """
    kept, counts = [], {}
    for record in records:
        outcome = "unusable"
        if record["tries"]:
            attempt, broken = best_try(record["tries"], config)
            outcome = broken or "kept"
            if not broken:
                kept.append({**rows[record["row"]], "process": thought_of(attempt["text"])})
        for kind in ("all", record["problem_type"]):
            counts.setdefault(kind, Counter()).update(("rows", outcome))
    return kept, {kind: {name: found[name] for name in ("rows", *OUTCOMES)}
                  for kind, found in counts.items()}  # fmt: skip


# ------------------------------------------------------------------------------------ generation


def tries_record(found: Answer) -> dict:
    """All tries of a row with what the rules ask of them; none if the row cannot be used."""
    sample, rollout, tries = found.sample, found.rollout, []
    if rollout is not None:
        columns = rollout.texts, rollout.completion_ids, rollout.completion_mask
        tries = [
            {
                "text": text, "length": int(mask.sum()),
                "accuracy": accuracy_reward(text, sample.solution, sample.problem_type),
                "repetition": repeated_share(ids[mask].tolist()),
            }
            for text, ids, mask in zip(*columns, strict=True)
        ]  # fmt: skip
    return {
        "row": sample.row, "problem_id": sample.problem_id, "problem_type": sample.problem_type,
        "path": sample.path, "file_state": found.file_state, "error": found.error, "tries": tries,
    }  # fmt: skip


def annotate(config: AnnotateConfig, world: World) -> None:
    """Write --out and its report from the tries, which are generated where they are not there."""
    samples = load_samples(config.data, config.data_root or None)
    template = load_template(config.prompt_template)
    made_by = provenance(config, NOT_IN_TRIES, world, template)
    made_by["data_sha256"] = file_sha256(config.data)
    out, batches = Path(config.out), fixed_batches(samples, config.batch_size)
    tries = Results(
        out.parent, f"{out.name}.tries", made_by, world, batches, overwrite=config.overwrite
    )
    if not tries.finished:
        with responder(config, world, template) as answers:
            tries.run(
                lambda batches: (
                    (number, [tries_record(found) for found in batch])
                    for number, batch in answers(batches, num_samples=config.num_samples)
                ),
                lambda records: {"model": config.model, "data": config.data},
                in_step=config.sharded_generation,
            )
    if world.is_main:
        rows, _ = read_rows(Path(config.data))
        kept, counts = filter_tries(rows, read_records(tries.records_file), config)
        # The report comes first: where --out is, it is whole and has its report.
        report = out.with_name(f"{out.name}.report.json")
        write_json(report, {"rows": counts, "settings": asdict(config)})
        write_whole(out, json.dumps(kept, indent=1) + "\n")
        print_report(config, counts)


def print_report(config: AnnotateConfig, report: dict[str, dict[str, int]]) -> None:
    """The counts as a table, and how to train on what was written."""
    columns = ("rows", *OUTCOMES)
    log(f"\n{config.out}: rows kept, and dropped by the rule that the best try breaks\n")
    log(f"{'':15}{''.join(f'{name:>11}' for name in columns)}")
    for kind, counts in report.items():
        log(f"{kind:15}{''.join(f'{counts[name]:11}' for name in columns)}")
    root = config.data_root or Path(config.data).parent
    log(f"\nto train on it: train_sft.py --data {config.out} --data_root {root}")


def main() -> None:
    config, is_toy = parse_config(AnnotateConfig, TOY_DEFAULTS, REAL_COMMAND)
    config.check()
    with process_group(PATIENCE, precision=config.precision, cpu_fallback=is_toy) as world:
        if is_toy:
            log(f"the embedded toy (neither --model nor --data given); a real run: {REAL_COMMAND}")
            main_does(world, toy.ensure_toy)
            require(Path(config.model).is_dir(), f"{config.model} is not there: run train_rl.py")
        annotate(config, world)


if __name__ == "__main__":
    run_main(main)
