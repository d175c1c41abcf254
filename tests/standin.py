"""What several test files share: responses that no model made, and scripts in this process."""

import sys

import torch

from sampling import Rollout


def rollout_of(prompt, *texts, length=2, ended=True):
    """A Rollout of so many tokens, all alike, and these texts."""
    mask = torch.ones(len(texts), length, dtype=torch.bool)
    ends = torch.full((len(texts),), ended)
    return Rollout(prompt, mask.long(), mask, ends, mask.float(), list(texts))


def run_script(module, *argv):
    """What `python SCRIPT ARGV` does; what the user did wrong is a UserError."""
    before = sys.argv
    sys.argv = [module.__file__, *map(str, argv)]
    try:
        module.main()
    finally:
        sys.argv = before
