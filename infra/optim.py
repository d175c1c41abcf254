"""AdamW, its schedule, and one clipped update."""

import math

import torch
from torch import nn
from torch.optim import AdamW


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW with its state allocated. Biases and norms, the vectors, do not decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)
    for parameter in trainable:  # what AdamW makes in its first step, to be saved and loaded
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_steps: int) -> float:
    """The rate of a step counted from 0: a linear warm-up, then a half cosine down to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def update(
    model: nn.Module, optimizer: AdamW, learning_rate: float, max_grad_norm: float, loss: float
) -> float:
    """Clip, step, clear; returns the gradient's norm before the clip, over all ranks.

    Where the norm or `loss`, that of all ranks, is not finite, the weights stay as they are and nan
    comes back.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    is_finite = math.isfinite(norm) and math.isfinite(loss)
    if is_finite:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad()
    return norm if is_finite else math.nan
