"""What r_t moves, from the rollouts that runs have recorded: no new run, no seeds.

    python experiments/offline.py runs/rl [runs/rl_2 ..]
    python experiments/offline.py runs/rl --model runs/rl/model --steps 997 998 999 1000

Each variant computes the advantages of every video group again, with its r_t and without. `moved`
is the share of groups in which they differ, `effect` is temporal_effect, the mean of |A_i - A_i
(without r_t)|, to be read beside `size`, the mean of |A_i(without r_t)|: norms differ in scale.

--model adds the gradients of Eq. 4 at that checkpoint on the rollouts of some steps, images too:
the cosine between the one with r_t (T-GRPO) and the one without (GRPO), and the relative length of
their difference; at ratio 1, as in the first update, and without the KL, which both have.
rollouts.jsonl has texts and lengths but no token ids. A group is counted and left out if one of its
responses has another length when it is tokenised again: mostly one that spells a word in pieces.
(Other pieces of the same length, or another end token, would go unnoticed.)

Shapes: G responses of a group, G~ shuffled ones, T tokens.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import Prompt, load_samples, load_template, make_prompt
from infra.distributed import run_main
from infra.errors import UserError, require
from model import group_logprobs, load_model, load_normalisation, load_tokenizer
from tgrpo import (
    add_temporal_reward,
    advantages_of_parts,
    temporal_effect,
    temporal_reward,
    tgrpo_loss,
)

MOVED = 1e-6  # advantages closer than this differ by rounding
NO_PARTS = ("text", "length", "reward", "advantage", "temporal")  # of a recorded response
LIMITS = ("max_frames", "min_pixels", "max_pixels", "image_max_pixels")


@dataclass(frozen=True)
class Group:
    """The recorded responses to one prompt. parts: float64 (G,) each, of the reward without r_t.
    correct: bool (G,). shuffled: float64 (G~,), accuracy reward. correct_shuffled: bool (G~,)."""

    record: dict
    parts: dict[str, Tensor]
    correct: Tensor
    shuffled: Tensor
    correct_shuffled: Tensor


# Eq. 1 and what may stand in its place: whether a group has r_t > 0.
RULES: dict[str, Callable[[Group], object]] = {
    ">=": lambda group: temporal_reward(group.correct, group.correct_shuffled),
    ">": lambda group: group.correct.double().mean() > group.correct_shuffled.double().mean(),
    "0.8": lambda group: group.parts["accuracy"].mean() >= 0.8 * group.shuffled.mean(),
}


@dataclass(frozen=True)
class Variant:
    """How advantages are made: a key of RULES, and flags of train_rl.py by their names."""

    rule: str = ">="
    alpha: float = 0.3
    omega: float = 0.2
    advantage_norm: str = "std"
    temporal_target: str = "reward"


VARIANTS = {
    "as printed": Variant(),
    "alpha 0.1": Variant(alpha=0.1),
    "alpha 0.5": Variant(alpha=0.5),
    "p > p~": Variant(rule=">"),
    "official 0.8": Variant(rule="0.8"),
    "norm none": Variant(advantage_norm="none"),
    "norm separate": Variant(advantage_norm="separate"),
    "on advantages": Variant(temporal_target="advantage"),
}
WITH_GRADIENT = ("as printed", "norm none", "norm separate", "on advantages")


# ------------------------------------------------------------------------------------- advantages


def read_group(record: dict, threshold: float) -> Group:
    """One line of rollouts.jsonl. threshold: accuracy from which on a response is correct."""
    responses = record["responses"]
    parts = {
        name: torch.tensor([response[name] for response in responses], dtype=torch.float64)
        for name in responses[0] if name not in NO_PARTS
    }  # fmt: skip
    accuracies = [response["accuracy"] for response in record["shuffled_responses"]]
    shuffled = torch.tensor(accuracies, dtype=torch.float64)
    return Group(record, parts, parts["accuracy"] >= threshold, shuffled, shuffled >= threshold)


def r_t_of(group: Group, variant: Variant) -> float:
    """Eq. 1, or the variant's rule; 0 for a group without shuffled responses."""
    has_it = len(group.shuffled) and bool(RULES[variant.rule](group))
    return variant.alpha if has_it else 0.0


def advantages(group: Group, variant: Variant, r_t: float) -> Tensor:
    """float64 (G,): a variant's advantages with this r_t, as train_rl.score_group has them."""
    zeros = torch.zeros_like(group.parts["accuracy"])
    in_reward = variant.temporal_target == "reward"
    temporal = add_temporal_reward(zeros, group.correct, r_t) if in_reward else zeros  # Eq. 2
    weights = {"temporal": variant.alpha, "length_reward": variant.omega}
    parts = group.parts | {"temporal": temporal}
    found = advantages_of_parts(parts, weights, variant.advantage_norm)  # Eq. 3
    return found if in_reward else add_temporal_reward(found, group.correct, r_t)


def measure(groups: list[Group], variant: Variant) -> dict[str, float]:
    """Of video groups: the shares that earned r_t, and in which it moved an advantage; its effect;
    and the size of the advantages without it."""
    r_ts = [r_t_of(group, variant) for group in groups]
    pairs = [(advantages(group, variant, r_t), advantages(group, variant, 0.0))
             for group, r_t in zip(groups, r_ts, strict=True)]  # fmt: skip
    ours, plain = (torch.stack(side) for side in zip(*pairs, strict=True))  # (groups, G)
    effects = temporal_effect(ours, plain)
    earned = [bool(r_t * group.correct.any()) for group, r_t in zip(groups, r_ts, strict=True)]
    return {
        "earned": sum(earned) / len(groups),
        "moved": float((effects.amax(-1) > MOVED).double().mean()),
        "effect": float(effects.mean()),
        "size": float(plain.abs().mean()),
    }


def spread_of(group: Group) -> str:
    """What Eq. 3 finds in a group without r_t. Under std r_t cancels in the first two cases: it
    raises all rewards or none of them, or the upper one of two values."""
    right, wrong = (sum(group.parts.values())[mask].round(decimals=9).unique()
                    for mask in (group.correct, ~group.correct))  # fmt: skip
    if len(right) + len(wrong) == 1:
        return "one value"
    return "two values" if len(right) == len(wrong) == 1 and right > wrong else "more"


def check_recorded(run: Path, groups: list[Group], config: dict) -> None:
    """UserError unless the run's own flags and recorded r_t give its recorded advantages."""
    names = ("alpha", "omega", "advantage_norm", "temporal_target")
    own = Variant(**{name: config[name] for name in names})
    for group in groups:
        recorded = torch.tensor([response["advantage"] for response in group.record["responses"]])
        error = (advantages(group, own, group.record["r_t"]) - recorded).abs().max()
        require(error < MOVED, f"{run}, row {group.record['row']} of step {group.record['step']}: "
                f"the recorded advantages are not those of its config, by {error:.2g}")  # fmt: skip


# -------------------------------------------------------------------------------------- gradients


def tokenise(group: Group, tokenizer, max_new_tokens: int) -> tuple[Tensor, Tensor] | None:
    """The ids of a group, int64 (1, G, T), with the end token of those that were not cut, and their
    mask, bool (1, G, T). None if a response does not have its recorded length."""
    rows, lengths = [], [response["length"] for response in group.record["responses"]]
    for response, length in zip(group.record["responses"], lengths, strict=True):
        ids = tokenizer(response["text"], add_special_tokens=False)["input_ids"]
        if len(ids) + 1 == length:
            ids = [*ids, tokenizer.eos_token_id]
        elif len(ids) != length or length != max_new_tokens:
            return None
        rows.append(pad(torch.tensor(ids), (0, max(lengths) - length)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.stack(rows)[None], mask[None]


def prompts_of(groups: list[Group], config: dict, tokenizer, folder: str) -> list[Prompt]:
    """What was answered, its frames decoded again and in order. UserError: another data file."""
    samples = {one.row: one for one in load_samples(config["data"], config["data_root"] or None)}
    options = {name: config[name] for name in LIMITS} | load_normalisation(folder)
    options["template"] = load_template(config["prompt_template"])
    for record in (group.record for group in groups):
        sample = samples.get(record["row"])
        same = sample and [sample.problem, sample.solution] == [record["problem"],
                                                                record["solution"]]  # fmt: skip
        require(same, f"row {record['row']} of {config['data']} is not the one that was answered")
    return [make_prompt(samples[group.record["row"]], tokenizer, **options) for group in groups]


def gradient_cosines(config: dict, groups: list[Group], folder: str) -> dict[str, dict]:
    """For each variant `cosine` and `change`, |g with r_t - g without| / |g without|, g summed over
    the groups; and under "groups" how many were used and left_out."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.device("cpu"))
    tokens = [tokenise(group, tokenizer, config["max_new_tokens"]) for group in groups]
    used = [(group, ids) for group, ids in zip(groups, tokens, strict=True) if ids]
    require(used, "no group of these steps has its recorded lengths when tokenised again")
    prompts = prompts_of([group for group, _ in used], config, tokenizer, folder)
    weights = list(model.parameters())
    sums = {(name, has_r_t): torch.zeros(sum(weight.numel() for weight in weights))
            for name in WITH_GRADIENT for has_r_t in (True, False)}  # fmt: skip
    for (group, (ids, mask)), prompt in zip(used, prompts, strict=True):
        logp = group_logprobs(model, [prompt], ids, mask)  # (1, G, T)
        for (name, has_r_t), total in sums.items():
            r_t = r_t_of(group, VARIANTS[name]) if has_r_t else 0.0
            of_group = advantages(group, VARIANTS[name], r_t)[None]
            loss, _ = tgrpo_loss(logp, logp, logp, of_group, mask)
            found = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
            total += torch.cat([part.flatten() for part in found])
    rows = {}
    for name in WITH_GRADIENT:
        ours, plain = sums[name, True].double(), sums[name, False].double()
        rows[name] = {"cosine": float(cosine_similarity(ours, plain, dim=0)),
                      "change": float((ours - plain).norm() / plain.norm())}  # fmt: skip
    return rows | {"groups": {"used": len(used), "left_out": len(groups) - len(used)}}


# ------------------------------------------------------------------------------------ the command


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.4f}' for value in row.values())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of RL runs with videos")
    add("--model", help="folder of a checkpoint's model: adds the gradients; takes one RUN")
    add("--steps", nargs="+", type=int, help="with --model; default: the last four of the run")
    add("--out", type=Path, help="JSON file for the same figures")
    options = parser.parse_args()
    require(not options.model or len(options.runs) == 1, "--model takes one RUN")
    require(options.model or not options.steps, "--steps needs --model")
    everything: list[Group] = []
    for run in options.runs:
        require((run / "rollouts.jsonl").is_file(), f"{run} is no RL run: it has no rollouts.jsonl")
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        lines = (run / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
        groups = [read_group(json.loads(line), config["correct_threshold"]) for line in lines]
        check_recorded(run, groups, config)
        everything += groups
    videos = [group for group in everything if len(group.shuffled)]
    require(videos, "no group has responses to shuffled frames: plain GRPO, or images alone")
    kinds = {kind: [group for group in videos if spread_of(group) == kind]
             for kind in ("one value", "two values", "more")}  # fmt: skip
    found = {
        "variants": {name: measure(videos, variant) for name, variant in VARIANTS.items()},
        "by_spread": {kind: {"share": len(those) / len(videos), **measure(those, Variant())}
                      for kind, those in kinds.items() if those},
    }  # fmt: skip
    print(f"{len(videos)} video groups of {len(options.runs)} runs")
    print_table("all groups", found["variants"])
    print_table("as printed, by reward values", found["by_spread"])
    if options.model:
        last = everything[-1].record["step"]
        steps = options.steps or range(last - 3, last + 1)
        chosen = [group for group in everything if group.record["step"] in steps]
        require(chosen, f"{options.runs[0]} has no rollouts of these steps: it has 1 to {last}")
        found["gradients"] = gradient_cosines(config, chosen, options.model)
        print_table("gradients", {name: found["gradients"][name] for name in WITH_GRADIENT})
        print("{used} groups; {left_out} left out".format(**found["gradients"]["groups"]))
    if options.out:
        text = json.dumps({"runs": list(map(str, options.runs)), "groups": len(videos), **found})
        try:
            options.out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {options.out}: {error.strerror}") from None


if __name__ == "__main__":
    run_main(main)
