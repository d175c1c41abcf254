"""The flags of the scripts: the names that others rely on, the toy's defaults, rules across flags,
and the batch, which belongs to the algorithm and not to the machine."""

import dataclasses

import pytest

import eval as evaluation
import train_rl
import train_sft
from config import RLConfig, SFTConfig, TrainConfig
from infra.errors import UserError
from infra.flags import parse_config

SCRIPTS = {
    "sft": (SFTConfig, train_sft), "rl": (RLConfig, train_rl),
    "eval": (evaluation.EvalConfig, evaluation),
}  # fmt: skip


def parse(script, *argv):
    cls, module = SCRIPTS[script]
    return parse_config(cls, module.TOY_DEFAULTS, module.REAL_COMMAND, list(argv))


SHARED = (
    "model data data_root output_dir seed max_frames min_pixels max_pixels image_max_pixels "
    "prompt_template num_workers decode_timeout"
)
TRAINING = SHARED + (
    " max_steps num_epochs learning_rate weight_decay max_grad_norm warmup_steps prompts_per_step "
    "prompts_per_rank data_types save_every keep_last keep_best resume val_data val_every timeout "
    "max_skipped skip_bad_samples allow_changed_config replicas freeze_vision precision tensorboard"
)
RL = TRAINING + (
    " group_size shuffled_group_size alpha omega l_min l_max beta clip_eps correct_threshold "
    "num_iterations temporal temporal_target length_reward max_new_tokens"
)
EVAL = SHARED + " order batch_size temperature top_p max_new_tokens"


@pytest.mark.parametrize(("script", "names"), [("sft", TRAINING), ("rl", RL), ("eval", EVAL)])
def test_flags_have_the_names_that_others_rely_on_and_the_toy_runs_with_them(script, names):
    cls, module = SCRIPTS[script]
    fields = {item.name: item for item in dataclasses.fields(cls)}
    assert set(names.split()) <= set(fields)
    assert [name for name, item in fields.items() if not item.metadata.get("help")] == []
    config, is_toy = parse(script)
    assert (config, is_toy) == (cls(**module.TOY_DEFAULTS), True)
    config.check()


TRAINING_VALUES = [
    ("prompts_per_step", 0), ("max_frames", 0), ("data_types", "audio"), ("timeout", "inf"),
    ("num_epochs", "inf"), ("decode_timeout", "inf"), ("max_pixels", 100),
    ("image_max_pixels", 100), ("keep_best", "val_acuracy"), ("keep_best", "val_accuracy"),
    ("precision", "fp16"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        *((script, *case) for script in ("sft", "rl") for case in TRAINING_VALUES),
        ("rl", "group_size", 1), ("rl", "l_max", 319), ("rl", "temporal_target", "return"),
        ("sft", "keep_best", "reward"), ("eval", "order", "sorted"), ("eval", "top_p", 1.5),
        ("eval", "temperature", "nan"), ("eval", "max_pixels", 100),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_refused_by_its_flags_name(script, name, value):
    """Faults 8 (a misspelt metric, one that needs --val_data) and 23 (not finite)."""
    config, _ = parse(script, "--model", "m", "--data", "d", f"--{name}", str(value))
    with pytest.raises(UserError, match=f"--{name}") as caught:
        config.check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("cls", "metric"), [(SFTConfig, "loss"), (RLConfig, "reward")])
def test_metrics_that_the_best_checkpoint_can_be_kept_by(cls, metric):
    cls(keep_best=metric).check()
    cls(keep_best="val_gap", val_data="val.json").check()


# -------------------------------------------------------------------------------------- the batch

UNEVEN = {
    "uneven": (8, 3, "8 cannot be dealt evenly to 3 ranks: take 6 or 9 prompts, or 2 or 4 ranks"),
    "odd": (7, 2, "7 cannot be dealt evenly to 2 ranks: take 6 or 8 prompts, or 1 or 7 ranks"),
    "too-many-ranks": (8, 9, "8 cannot be dealt evenly to 9 ranks: take 9 prompts, or 8 ranks"),
}


@pytest.mark.parametrize(("prompts", "ranks", "message"), UNEVEN.values(), ids=UNEVEN)
def test_uneven_shares_name_both_numbers_and_the_nearest_that_work(prompts, ranks, message):
    assert TrainConfig().rank_prompts(4) == 2
    with pytest.raises(UserError) as caught:
        TrainConfig(prompts_per_step=prompts).rank_prompts(ranks)
    assert str(caught.value) == f"--prompts_per_step {message}"


STEPS = {
    "epoch": ({}, 3),  # 10 samples in steps of 4: rounded up
    "two-epochs": ({"num_epochs": 2.0}, 5),
    "a-part": ({"num_epochs": 0.1}, 1),
    "max-steps-wins": ({"max_steps": 7}, 7),
}


@pytest.mark.parametrize(("flags", "expected"), STEPS.values(), ids=STEPS)
def test_number_of_steps(flags, expected):
    assert TrainConfig(prompts_per_step=4, **flags).num_steps(10) == expected
    assert RLConfig().num_steps(10) == 1000


def test_num_epochs_alone_counts_and_excludes_max_steps():
    """Fault 21: `train_rl.py --num_epochs 0.5` made 1000 steps, and the toy's 300."""
    for argv in ([], ["--model", "m", "--data", "d"]):
        config, _ = parse("rl", "--num_epochs", "0.5", *argv)
        assert config.num_steps(160) == 80 // config.prompts_per_step
    with pytest.raises(UserError, match="--num_epochs and --max_steps exclude each other"):
        parse("rl", "--num_epochs", "0.5", "--max_steps", "3")
