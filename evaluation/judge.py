"""Section 4.5 and Figure 6: the share of responses with temporal reasoning, by a judge model.

The judge reads two prompts about each video item of a results file, one on the question alone, so
that all models are judged on the same questions, and one on the response. The paper's judge is
Qwen2.5-VL-72B; any Qwen2.5-VL serves. Items of images and unusable ones are left out.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from data import VISION_TOKENS, Prompt
from evaluation.answering import load_for_answers
from evaluation.report import percent
from evaluation.results import (
    Batch,
    Results,
    file_sha256,
    fingerprint,
    model_path,
    read_records,
    read_summary,
)
from evaluation.scores import weighted_mean
from infra.distributed import World, log, on_main
from infra.errors import UserError, require
from model import load_tokenizer, require_room
from sampling import is_sharded, sample_groups

# The wording is ours: the paper's is in a figure that its text does not hold (App. C.2).
JUDGE_PROMPTS = {
    "question": (
        "Below is a question about a video. Does answering it need temporal reasoning? It does if "
        "the answer depends on the order, the direction, the speed, the duration or the number of "
        "events or movements, on what changes in the course of the video, or on what causes what. "
        "It does not if one well-chosen frame, or the frames in any order, would be enough.\n\n"
        "Question:\n{question}\n\n"
        "Reply with one word, yes or no."
    ),
    "response": (
        "Below are a question about a video and a response to it. Does the response use temporal "
        "reasoning? It does if it reaches its answer by relating different moments of the video to "
        "each other: what comes before or after what, how something moves or changes, how often or "
        "how long it happens, what leads to what. It does not if it only describes what can be "
        "seen at one moment, or only says that it has watched the video.\n\n"
        "Question:\n{question}\n\nResponse:\n{response}\n\n"
        "Reply with one word, yes or no."
    ),
}
JUDGE_TOKENS = 16  # the reply is one word
GREEDY = {"temperature": 0.01, "top_p": 0.001}  # as for the answers (Sec. 4.1)


def parse_verdict(reply: str) -> bool | None:
    """True for a reply that begins with yes, False for no, whatever surrounds the word; else None.

    >>> [parse_verdict(reply) for reply in ("Yes.", "**no**, it", "The answer is yes", "not")]
    [True, False, None, None]
    """
    match = re.match(r"[\W_]*(yes|no)(?![^\W_])", reply, re.IGNORECASE)
    return None if match is None else match[1].lower() == "yes"


def judge_prompts(item: dict) -> list[str]:
    """The texts about an item of a results file: on its question, and on its response."""
    fields = {"question": "\n".join([item["problem"], *item["options"]]),
              "response": item["response"]}  # fmt: skip
    # In one pass: braces in a question or a response are left as they are.
    return [re.sub(r"{(question|response)}", lambda match: fields[match[1]], template)
            for template in JUDGE_PROMPTS.values()]  # fmt: skip


def text_prompt(text: str, tokenizer) -> Prompt:
    """A prompt without an image, through the chat template.

    Raises:
        UserError: the text spells a vision token, which would ask for an image.
    """
    for token in VISION_TOKENS:
        require(token not in text, f"it holds the vision token {token} as text")
    content = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    chat = tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor(tokenizer(chat, add_special_tokens=False)["input_ids"])
    return Prompt(
        input_ids=ids, vision_start=len(ids), pixel_values=torch.empty(0, 1176),
        grid_thw=torch.zeros(3, dtype=torch.long), seconds_per_grid=0.0, is_video=False,
        order="ordered", sample=None,
    )  # fmt: skip


def ask(model, tokenizer, batches: list[Batch]) -> Iterator[tuple[int, list[dict]]]:
    """The number of each batch and its verdicts, both None where a prompt cannot be used."""
    for number, items in batches:
        prompts, errors = [], {}
        for item in items:
            try:
                pair = [text_prompt(text, tokenizer) for text in judge_prompts(item)]
                for prompt in pair:
                    require_room(prompt, JUDGE_TOKENS, model.config)
                prompts += pair
            except UserError as error:
                errors[item["row"]] = str(error)
        replies: list[str] = []
        if prompts or is_sharded(model):  # every rank joins the collectives of sharded weights
            asked = prompts or [text_prompt("-", tokenizer)]
            keys = [[(0,)]] * len(asked)
            rollouts = sample_groups(model, tokenizer, asked, keys, JUDGE_TOKENS, **GREEDY)
            replies = [rollout.texts[0] for rollout in rollouts[: len(prompts)]]
        pairs = iter(zip(replies[::2], replies[1::2], strict=True))
        records = []
        for item in items:
            pair = ("", "") if item["row"] in errors else next(pairs)
            records.append({
                "row": item["row"], "problem_id": item["problem_id"], "path": item["path"],
                "question": parse_verdict(pair[0]), "response": parse_verdict(pair[1]),
                "replies": list(pair), "error": errors.get(item["row"]),
            })  # fmt: skip
        if items:
            yield number, records


def summarise_verdicts(records: list[dict]) -> dict:
    """The share of temporally grounded responses among those to questions that need it (Figure 6).

    A verdict that cannot be parsed is neither yes nor no: it is counted, and left out of the share.
    """
    temporal = [record for record in records if record["question"]]
    judged = [record for record in temporal if record["response"] is not None]
    share, interval = None, None
    if judged:
        values = [float(record["response"]) for record in judged]
        videos = [record["path"] for record in judged]
        share, interval = weighted_mean(values, [1.0] * len(values), videos)
    unparsed = len(temporal) - len(judged) + sum(record["question"] is None for record in records)
    return {"n": len(judged), "grounded": share, "interval": interval, "num_items": len(records),
            "temporal_questions": len(temporal), "unparsed": unparsed}  # fmt: skip


def judged_items(file: Path) -> list[dict]:
    """The items of a results file that a judge can read: those of videos, with a response."""
    items = [item for item in read_records(file)
             if item.get("data_type") == "video" and item.get("response") is not None]  # fmt: skip
    require(items, f"{file} has no response to a video question")
    return items


def judge(
    name: str, files: list[str], world: World, batch_size: int, sharded: bool, overwrite: bool
) -> None:
    """Judge results files; write <results>.judge.jsonl and .judge.summary.json beside each, and
    print the shares.

    Args:
        name: the judge, a model folder or Hub id.
    Raises:
        UserError: naming the file that is not a results file of eval.py.
    """
    items = {Path(file): judged_items(Path(file)) for file in files}
    made_by = {
        "model": model_path(name), "model_fingerprint": on_main(world, lambda: fingerprint(name)),
        "device": f"{world.device.type} {world.dtype}", "prompts": JUDGE_PROMPTS,
        "max_new_tokens": JUDGE_TOKENS, "batch_size": batch_size, **GREEDY,
    }  # fmt: skip
    jobs = {}
    for file, chosen in items.items():
        batches = [chosen[at : at + batch_size] for at in range(0, len(chosen), batch_size)]
        provenance = made_by | {"results_sha256": file_sha256(file)}
        jobs[file] = Results(file.parent, f"{file.stem}.judge", provenance, world, batches,
                             {"model_fingerprint", "results_sha256"}, overwrite)  # fmt: skip
    if not all(results.finished for results in jobs.values()):
        tokenizer = load_tokenizer(name)
        model = load_for_answers(name, world, sharded)
    for file, results in jobs.items():
        if not results.finished:
            results.run(
                lambda batches: ask(model, tokenizer, batches),
                lambda records: {"judge": name, **summarise_verdicts(records)}, in_step=sharded,
            )  # fmt: skip
        if world.is_main:
            print_verdicts(file, read_summary(results.summary_file))


def print_verdicts(file: Path, summary: dict) -> None:
    share = percent({"score": summary["grounded"], "interval": summary["interval"]})
    log(f"\n{file}: temporally grounded responses {share} percent of {summary['n']}, judged by "
        f"{summary['judge']}\n  {summary['temporal_questions']} of {summary['num_items']} video "
        f"questions need temporal reasoning; {summary['unparsed']} verdicts are neither yes nor "
        "no, in no share")  # fmt: skip
