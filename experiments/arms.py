"""The arms and contrasts of PROTOCOL.md: what is trained, and what is compared with what."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arm:
    """One way of training, with the seeds 0 .. num_seeds - 1.

    flags: of train_rl.py, beside the study's. model, data: what RL starts from, and the bed's data
    file. trains: False is the cold-started model itself. times_steps: factor of --max_steps.
    """

    num_seeds: int
    flags: dict = field(default_factory=dict)
    model: str = "sft"
    data: str = "rl_cue90"
    trains: bool = True
    times_steps: int = 1

    @property
    def needs_bed(self) -> bool:
        return not self.trains or (self.model, self.data) != ("sft", "rl_cue90")


FIRST_PILOT = 100  # seeds from here on are the pilot's
PLAIN, NONE = {"temporal": "false"}, {"advantage_norm": "none"}
SEPARATE, ADVANTAGE = {"advantage_norm": "separate"}, {"temporal_target": "advantage"}
PLACEBO, NO_LENGTH = {"shuffled_group_size": 0}, {"length_reward": "false"}
ARMS = {
    "grpo": Arm(16, PLAIN),
    "tgrpo": Arm(16),
    "grpo_none": Arm(16, NONE | PLAIN),
    "tgrpo_none": Arm(16, NONE),
    "placebo_none": Arm(16, NONE | PLACEBO),
    "tgrpo_advantage": Arm(16, ADVANTAGE),
    "placebo_advantage": Arm(16, ADVANTAGE | PLACEBO),
    "cold_start": Arm(16, trains=False),
    "grpo_cue25": Arm(6, PLAIN, data="rl_cue25"),
    "grpo_separate": Arm(6, SEPARATE | PLAIN),
    "tgrpo_separate": Arm(6, SEPARATE),
    "grpo_no_length": Arm(6, NO_LENGTH | PLAIN),
    "tgrpo_no_length": Arm(6, NO_LENGTH),
    "tgrpo_no_images": Arm(6, {"data_types": "video"}),
    "tgrpo_alpha01": Arm(3, {"alpha": 0.1}),
    "tgrpo_alpha05": Arm(3, {"alpha": 0.5}),
    "tgrpo_zero": Arm(3, model="base"),
    "grpo_steps3": Arm(3, PLAIN, times_steps=3),
    "tgrpo_steps3": Arm(3, times_steps=3),
}

# What is compared: the difference of two arms, the first minus the second.
PRIMARY = {
    "r_t helps, as printed (std)": ("tgrpo", "grpo"),
    "r_t helps without std": ("tgrpo_none", "grpo_none"),
    "r_t on advantages beats its placebo": ("tgrpo_advantage", "placebo_advantage"),
}
EXPLORATORY = {
    "without std, r_t against its placebo": ("tgrpo_none", "placebo_none"),
    "without std, the placebo": ("placebo_none", "grpo_none"),
    "r_t on advantages": ("tgrpo_advantage", "grpo"),
    "the placebo on advantages": ("placebo_advantage", "grpo"),
    "r_t, each part normalised by itself": ("tgrpo_separate", "grpo_separate"),
    "r_t, without the length reward": ("tgrpo_no_length", "grpo_no_length"),
    "the length reward": ("tgrpo", "tgrpo_no_length"),
    "images": ("tgrpo", "tgrpo_no_images"),
    "RL": ("tgrpo", "cold_start"),
    "the cold start": ("tgrpo", "tgrpo_zero"),
    "alpha 0.3 against 0.1": ("tgrpo", "tgrpo_alpha01"),
    "alpha 0.3 against 0.5": ("tgrpo", "tgrpo_alpha05"),
    "three times the steps": ("tgrpo_steps3", "tgrpo"),
    "r_t, three times the steps": ("tgrpo_steps3", "grpo_steps3"),
}
CONTROL = ("grpo_cue25", "grpo")  # must differ by NEEDED points, or the bed measures nothing
NEEDED = 10.0
SMALLEST = 2.0  # points: the smallest effect of interest
