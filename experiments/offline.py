"""What r_t moves, from the rollouts that a run has recorded: no new run, no seeds.

    python experiments/offline.py runs/rl [runs/rl_2 ..]      advantages under other rules and norms
    python experiments/offline.py runs/rl --model runs/rl/model --steps 997 998 999 1000

Each variant computes the advantages of every video group again, with its r_t and without, from the
recorded parts of the reward. `effect` is temporal_effect, the mean of |A_i - A_i(without r_t)|;
it reads beside `size`, the mean of |A_i(without r_t)|, since only std and separate share a scale.

--model adds the gradients of Eq. 4 at that checkpoint on the rollouts of some steps, videos and
images: the cosine between the one with r_t (T-GRPO) and the one without (GRPO), at ratio 1, as in
the first update, and without the KL, which both have. rollouts.jsonl has texts and lengths but no
token ids: a group is counted and left out if a response, tokenised again, has another length.

Shapes: G responses of a group, G~ shuffled ones, T tokens.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import MediaConfig
from data import Prompt, Sample, load_samples, load_template, make_prompt
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

MOVED = 1e-6  # an advantage that r_t changes by less differs in rounding alone


@dataclass(frozen=True)
class Group:
    """The recorded group of one prompt. parts: float64 (G,) each, without r_t. correct: bool (G,).
    shuffled: float64 (G~,), accuracy of the shuffled responses; None where there are none."""

    record: dict
    parts: dict[str, Tensor]
    correct: Tensor
    shuffled: Tensor | None
    threshold: float  # of accuracy, from which on a response is correct


# Eq. 1 and what stands in its place: whether a group gets r_t.
RULES: dict[str, Callable[[Group], bool]] = {
    ">=": lambda group: temporal_reward(group.correct, group.shuffled >= group.threshold) > 0,
    ">": lambda group: group.correct.double().mean()
    > (group.shuffled >= group.threshold).double().mean(),
    "0.8": lambda group: group.parts["accuracy"].mean() >= 0.8 * group.shuffled.mean(),
    "always": lambda group: True,  # the placebo
}


@dataclass(frozen=True)
class Variant:
    """How advantages are made: a key of RULES, and flags of train_rl.py by their names."""

    rule: str = ">="
    alpha: float = 0.3
    advantage_norm: str = "std"
    temporal_target: str = "reward"
    omega: float = 0.2


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


def read_groups(run: Path) -> tuple[dict, list[Group]]:
    """A run's config and the groups of its rollouts.jsonl, in their order."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    lines = (run / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    return config, [read_group(json.loads(line), config["correct_threshold"]) for line in lines]


def read_group(record: dict, threshold: float) -> Group:
    """One line of rollouts.jsonl. Every number of a response that is no part of the reward is
    named here, so that a part that was added to train_rl.py is one here too."""
    known = ("text", "length", "reward", "advantage", "temporal")
    responses, shuffled = record["responses"], record["shuffled_responses"]
    parts = {
        name: torch.tensor([response[name] for response in responses], dtype=torch.float64)
        for name in responses[0] if name not in known
    }  # fmt: skip
    accuracies = torch.tensor([one["accuracy"] for one in shuffled], dtype=torch.float64)
    correct = parts["accuracy"] >= threshold
    return Group(record, parts, correct, accuracies if shuffled else None, threshold)


def advantages(group: Group, variant: Variant, r_t: float) -> Tensor:
    """float64 (G,): the advantages of a variant with this r_t, as train_rl.score_group has them."""
    weights = {"temporal": variant.alpha, "length_reward": variant.omega}
    zeros = torch.zeros_like(group.parts["accuracy"])
    in_reward = variant.temporal_target == "reward"
    temporal = add_temporal_reward(zeros, group.correct, r_t) if in_reward else zeros  # Eq. 2
    parts = group.parts | {"temporal": temporal}
    found = advantages_of_parts(parts, weights, variant.advantage_norm)  # Eq. 3
    return found if in_reward else add_temporal_reward(found, group.correct, r_t)


def both(group: Group, variant: Variant) -> tuple[Tensor, Tensor]:
    """float64 (G,) twice: a variant's advantages with its r_t, and without."""
    gets_it = group.shuffled is not None and RULES[variant.rule](group)
    r_t = variant.alpha if gets_it else 0.0
    return advantages(group, variant, r_t), advantages(group, variant, 0.0)


def measure(groups: list[Group], variant: Variant) -> dict[str, float]:
    """Of the video groups: shares that earned r_t and in which it moved an advantage, its effect,
    and the size of the advantages without it."""
    pairs = [both(group, variant) for group in groups]
    effects = torch.stack([temporal_effect(*pair) for pair in pairs])  # (groups, G)
    earned = [bool(RULES[variant.rule](group) and group.correct.any()) for group in groups]
    return {
        "earned": sum(earned) / len(groups),
        "moved": float((effects.amax(-1) > MOVED).double().mean()),
        "effect": float(effects.mean()),
        "size": float(torch.stack([without for _, without in pairs]).abs().mean()),
    }


def spread_of(group: Group) -> str:
    """What Eq. 3 finds in a group without r_t. In the first two cases r_t cancels under std: it
    moves no reward away from the others, or the upper one of two."""
    rewards = sum(group.parts.values()).round(decimals=9)
    if len(rewards.unique()) == 1 and bool(group.correct.all() == group.correct.any()):
        return "no spread"
    values = [rewards[mask].unique() for mask in (group.correct, ~group.correct)]
    return "two values" if [len(value) for value in values] == [1, 1] else "more"


def by_spread(groups: list[Group], variant: Variant) -> dict[str, dict]:
    """measure() of the groups of each kind of spread, and their share of all."""
    kinds = {kind: [group for group in groups if spread_of(group) == kind]
             for kind in ("no spread", "two values", "more")}  # fmt: skip
    return {kind: {"share": len(those) / len(groups), **measure(those, variant)}
            for kind, those in kinds.items() if those}  # fmt: skip


def recorded_error(groups: list[Group], config: dict) -> float:
    """The largest |A_i - recorded A_i|, computed with the run's own flags and its recorded r_t: 0
    up to rounding, or this file does not do what train_rl.py did."""
    own = {name: config[name] for name in asdict(Variant()) if name != "rule"}
    errors = [
        advantages(group, Variant(**own), group.record["r_t"])
        - torch.tensor([response["advantage"] for response in group.record["responses"]])
        for group in groups
    ]
    return float(torch.stack(errors).abs().max())


# -------------------------------------------------------------------------------------- gradients


def token_ids(text: str, length: int, tokenizer, max_new_tokens: int) -> Tensor | None:
    """int64 (T,): a recorded response, tokenised again, with its end token unless it was cut; None
    if it does not have the recorded number of tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) + 1 == length:
        return torch.tensor([*ids, tokenizer.eos_token_id])
    return torch.tensor(ids) if len(ids) == length == max_new_tokens else None


def tokenise(group: Group, tokenizer, max_new_tokens: int) -> tuple[Tensor, Tensor] | None:
    """int64 and bool (1, G, T): ids and mask of a group; None if a response does not fit."""
    rows = [token_ids(response["text"], response["length"], tokenizer, max_new_tokens)
            for response in group.record["responses"]]  # fmt: skip
    if any(row is None for row in rows):
        return None
    longest = max(map(len, rows))
    ids = torch.stack([pad(row, (0, longest - len(row))) for row in rows])[None]
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(longest) < lengths[:, None])[None]


def prompt_of(group: Group, samples: dict[int, Sample], tokenizer, options: dict) -> Prompt:
    """The prompt that was answered, its frames in order, decoded again."""
    record = group.record
    sample = samples.get(record["row"])
    same = sample and (sample.problem, sample.solution) == (record["problem"], record["solution"])
    require(same, f"row {record['row']} of the data file is not the one that was answered")
    return make_prompt(sample, tokenizer, **options)


def gradient_cosines(config: dict, groups: list[Group], folder: str) -> dict:
    """For each variant the cosine between the gradients of Eq. 4 with and without r_t, summed over
    the groups, and the relative length of their difference; and how many groups were left out."""
    tokenizer, device = load_tokenizer(folder), torch.device("cpu")
    model = load_model(folder, device)
    samples = {one.row: one for one in load_samples(config["data"], config["data_root"] or None)}
    limits = MediaConfig(**{name: config[name] for name in vars(MediaConfig())}).limits()
    template = load_template(config["prompt_template"])
    options = {"template": template, **load_normalisation(folder), **limits}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    sums: dict[tuple[str, bool], Tensor] = {}
    num_left_out = 0
    for group in groups:
        tokens = tokenise(group, tokenizer, config["max_new_tokens"])
        if tokens is None:
            num_left_out += 1
            continue
        logp = group_logprobs(model, [prompt_of(group, samples, tokenizer, options)], *tokens)[0]
        for name in WITH_GRADIENT:
            for with_r_t, of_group in zip((True, False), both(group, VARIANTS[name]), strict=True):
                loss, _ = tgrpo_loss(logp, logp, logp, of_group, tokens[1][0])
                gradient = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
                flat = torch.cat([part.flatten() for part in gradient if part is not None])
                key = name, with_r_t
                sums[key] = sums[key] + flat if key in sums else flat
    require(sums, "no group of these steps has the recorded lengths when tokenised again")
    found: dict = {"groups": len(groups) - num_left_out, "left_out": num_left_out}
    for name in WITH_GRADIENT:
        ours, plain = sums[name, True].double(), sums[name, False].double()
        cosine = torch.nn.functional.cosine_similarity(ours, plain, dim=0)
        change = float((ours - plain).norm() / plain.norm())
        found[name] = {"cosine": float(cosine), "change": change}
    return found


# ------------------------------------------------------------------------------------ the command


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Named rows of numbers, as Markdown."""
    columns = list(next(iter(rows.values())))
    print(f"\n| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.4f}' for value in row.values())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="What r_t moves.", allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of RL runs with videos")
    add("--model", help="folder of a checkpoint's model: adds the gradients; takes one RUN")
    add("--steps", nargs="+", type=int, help="whose rollouts; default: the last four of the run")
    add("--out", type=Path, help="JSON file with the same figures")
    options = parser.parse_args()
    require(not options.model or len(options.runs) == 1, "--model takes one RUN")
    require(options.model or not options.steps, "--steps needs --model")
    found: dict = {"runs": [str(run) for run in options.runs]}
    videos: list[Group] = []
    for run in options.runs:
        require((run / "rollouts.jsonl").is_file(), f"{run} holds no rollouts.jsonl")
        config, groups = read_groups(run)
        error = recorded_error(groups, config)
        if error > MOVED:
            raise UserError(f"{run}: recomputed advantages differ from the recorded by {error:.2g}")
        videos += [group for group in groups if group.shuffled is not None]
    require(videos, "no group has responses to shuffled frames: plain GRPO, or images alone")
    print(f"{len(videos)} video groups of {len(options.runs)} runs; recorded advantages reproduced")
    found["groups"] = len(videos)
    found["variants"] = {name: measure(videos, variant) for name, variant in VARIANTS.items()}
    print_table(found["variants"])
    found["by_spread"] = by_spread(videos, VARIANTS["as printed"])
    print_table(found["by_spread"])
    if options.model:
        last = groups[-1].record["step"]
        steps = options.steps or range(max(1, last - 3), last + 1)
        chosen = [group for group in groups if group.record["step"] in steps]
        require(chosen, f"{options.runs[0]} has no rollouts of these steps: it has 1 to {last}")
        found["gradients"] = gradient_cosines(config, chosen, options.model)
        rows = {name: found["gradients"][name] for name in WITH_GRADIENT}
        print_table(rows)
        print("\n{groups} groups; {left_out} left out: other lengths when tokenised again".format(
            **found["gradients"]))  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
