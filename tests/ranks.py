"""What test_distributed.py launches with torchrun: short training runs in one process group.

usage: ranks.py OUT, in a folder that holds runs/toy/base and runs/toy/data
"""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import toy
import train_rl
import train_sft
from data import load_samples
from infra.distributed import die_with_parent, main_does, process_group, unsharded
from sampling import Rollout
from train_rl import RLConfig
from train_sft import SFTConfig

OUT = Path(sys.argv[1] if __name__ == "__main__" else ".")
COMMON = {
    "model": str(toy.BASE), "max_frames": 8, "num_workers": 1, "activation_checkpointing": False,
    "learning_rate": 1e-3, "max_steps": 3, "prompts_per_step": 4, "prompts_per_rank": 4,
}  # fmt: skip
RL = {"group_size": 4, "shuffled_group_size": 2, "max_new_tokens": 12, "l_min": 5, "l_max": 12}


def written_rollouts(policy, tokenizer, batch, config, step):
    """Rollouts as somebody wrote them: the same whatever the ranks, with rewards that differ."""

    def rollout(prompt, texts):
        ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
        width = max(map(len, ids))
        mask = torch.tensor([[place < len(row) for place in range(width)] for row in ids])
        padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        return Rollout(prompt, padded, mask, torch.ones(len(ids)).bool(), mask * 0.0, texts)

    rollouts = []
    for prompts in batch:
        sample = prompts[0].sample
        right = sample.solution
        texts = [
            f"<think>It goes from left to right.</think>\n{right}",
            "<think>I see a square.</think>\n<answer>Z</answer>",
            f"right {right}",
            "<think>It goes" + " up" * (step + sample.row % 3),
        ]
        ordered = rollout(prompts[0], texts)
        shuffled = rollout(prompts[1], texts[1:3]) if sample.is_video else None
        rollouts.append((ordered, shuffled))
    return rollouts


def same_losses(world):
    """SFT and RL on given rollouts: 2 ranks in passes of one prompt, others in one pass a rank."""
    sample_rollouts, train_rl.sample_rollouts = train_rl.sample_rollouts, written_rollouts
    passes = {"prompts_per_rank": 1 if world.size == 2 else 4}
    sft = {"data": str(toy.SFT_DATA), "output_dir": str(OUT / "sft")}
    train_sft.train(SFTConfig(**COMMON | passes | sft), world)
    for level, iterations in (("token", 1), ("sequence", 2)):
        rl = {"data": str(toy.RL_DATA), "output_dir": str(OUT / f"rl-{level}")}
        rl |= {"num_iterations": iterations, "ratio_level": level, "clip_eps": 0.01}
        rl["learning_rate"] = 1e-3 if level == "token" else 1e-4  # whole ratios soon explode
        train_rl.train(RLConfig(**COMMON | RL | passes | rl), world)
    train_rl.sample_rollouts = sample_rollouts


def tied(world):
    """SFT of a model with tied embeddings, as the 3B model has them: no lm_head on disk."""
    folder = OUT / "tied-base"

    def make():
        shutil.copytree(toy.BASE, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        weights = load_file(folder / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    main_does(world, make)
    sft = {"model": str(folder), "data": str(toy.SFT_DATA), "output_dir": str(OUT / "tied")}
    train_sft.train(SFTConfig(**COMMON | sft), world)
    if world.is_main:
        exported = load_file(OUT / "tied/model/model.safetensors")
        assert exported.keys() == load_file(folder / "model.safetensors").keys()


def sampled_twice(world):
    """RL with real rollouts, twice with one seed; the reference must come out as it went in."""
    load, kept = train_rl.load_policy_and_reference, []

    def load_and_keep(config, world):
        kept[:] = load(config, world)
        return kept

    train_rl.load_policy_and_reference = load_and_keep
    for name in ("once", "again"):
        rl = {"data": str(toy.RL_DATA), "output_dir": str(OUT / f"sampled-{name}")}
        rl["activation_checkpointing"] = True
        train_rl.train(RLConfig(**COMMON | RL | rl), world)
    policy, reference = kept
    fresh = load(RLConfig(**COMMON | {"data": str(toy.RL_DATA)}), world)[1]
    for mine, loaded in zip(reference.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine.to_local(), loaded.to_local()), "the reference has changed"
        assert mine.grad is None, "the reference has a gradient"
    assert not reference.training
    check_unsharded(policy)
    train_rl.load_policy_and_reference = load


def check_unsharded(policy):
    """Inside `unsharded` every rank holds the whole weights, and outside its part again."""
    whole = {name: parameter.full_tensor() for name, parameter in policy.named_parameters()}
    with unsharded(policy):
        for name, parameter in policy.named_parameters():
            assert not isinstance(parameter, DTensor), name
            assert torch.equal(parameter, whole[name]), name
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())


def unlike_ranks(world):
    """Even ranks see images alone and stop after 3 tokens, odd ones videos and stop after 12."""
    kind = ("image", "video")[world.rank % 2]
    for stage, source in (("sft", toy.SFT_DATA), ("rl", toy.RL_DATA)):
        rows = json.loads(source.read_text())
        file = OUT / f"{stage}-{kind}.json"
        if world.rank < 2:
            file.write_text(json.dumps([row for row in rows if row["data_type"] == kind]))
        dist.barrier()
        root = str(source.parent)
        assert len({sample.data_type for sample in load_samples(file, root)}) == 1
        mine = COMMON | {"data": str(file), "data_root": root}
        mine["output_dir"] = str(OUT / f"unlike-{stage}")
        mine |= {"max_steps": 5}
        if stage == "sft":
            train_sft.train(SFTConfig(**mine), world)
        else:
            config = RLConfig(**mine | RL)
            cut = 3 if kind == "image" else 12
            train_rl.train(dataclasses.replace(config, max_new_tokens=cut), world)


UNUSABLE = ("garbage.mp4", "empty.mp4", "directory.mp4", "fifo.mp4", "truncated.mp4", "none.mp4")


def unusable_media(world):
    """Both stages on 24 rows of which six have a file that is missing, broken or no file."""
    folder = OUT / "unusable"
    rows = json.loads(toy.RL_DATA.read_text())[:24]

    def make():
        folder.mkdir()
        (folder / "garbage.mp4").write_bytes(b"not a video" * 1000)
        (folder / "empty.mp4").touch()
        (folder / "directory.mp4").mkdir()
        os.mkfifo(folder / "fifo.mp4")
        ftyp = b"\0\0\0\x10ftypisom\0\0\0\0"
        (folder / "truncated.mp4").write_bytes(ftyp + b"\0\0\xff\xffmdat" + bytes(1000))
        for row in rows:
            row["path"] = f"runs/toy/data/{row['path']}"
            row["process"] = "<think>It goes.</think>"
        for number, name in enumerate(UNUSABLE):
            rows[3 * number + 1] |= {"data_type": "video", "path": f"{OUT.name}/unusable/{name}"}
        (folder / "rows.json").write_text(json.dumps(rows))

    main_does(world, make)
    common = COMMON | {"data": str(folder / "rows.json"), "data_root": "."}
    common |= {"max_steps": 24 // 4}
    train_sft.train(SFTConfig(**common | {"output_dir": str(OUT / "unusable-sft")}), world)
    train_rl.train(RLConfig(**common | RL | {"output_dir": str(OUT / "unusable-rl")}), world)


def frozen_vision(world):
    """Both stages with --freeze_vision: the tower stays, the rest learns as before."""
    for stage, train, config in (
        ("sft", train_sft.train, SFTConfig), ("rl", train_rl.train, RLConfig)
    ):  # fmt: skip
        flags = COMMON | (RL if stage == "rl" else {}) | {"freeze_vision": True}
        flags |= {"data": str(getattr(toy, f"{stage.upper()}_DATA"))}
        train(config(**flags | {"output_dir": str(OUT / f"frozen-{stage}")}), world)


if __name__ == "__main__":
    die_with_parent()
    with process_group(timeout=120) as world:
        same_losses(world)
        tied(world)
        if world.size == 2:
            sampled_twice(world)
            unlike_ranks(world)
            unusable_media(world)
            frozen_vision(world)
        main_does(world, lambda: (OUT / "done").write_text("all checks ran\n"))
