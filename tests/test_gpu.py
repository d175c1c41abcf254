"""What a user runs once on a machine with a GPU, before the first launch: `pytest -m gpu`.

Each test also runs on the CPU in the ordinary suite, but for those that ask CUDA itself. On the GPU
they compare with float32 on the CPU.
"""

import copy
import json
import os
import subprocess
import sys

import plain
import pytest
import torch
from conftest import ROOT

from infra.distributed import process_group, unsharded
from infra.optim import make_optimizer
from model import enable_packing, group_logprobs, load_model, load_tokenizer, shard
from sampling import sample_groups

KINDS = ["video", "image", "video"]  # prompts of different lengths


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def folder(toy_folder):
    return str(toy_folder / "runs/toy/base")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder):
    """float32 on the CPU, with every weight off its initial value."""
    return plain.shake(load_model(folder, torch.device("cpu")))


@pytest.fixture(scope="module")
def prompts(toy_folder, tokenizer):
    return plain.toy_prompts(toy_folder, tokenizer, KINDS)


@pytest.fixture(scope="module")
def completions():
    """ids and mask (P, G, T), responses of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[9, 1, 6], [4, 9, 2], [7, 3, 8]])
    ids = torch.randint(5, 250, (3, 3, 9), generator=generator)
    return ids, torch.arange(9) < lengths[..., None]


def moved(model, device, dtype=torch.float32):
    there = copy.deepcopy(model).to(device, dtype)
    enable_packing(there)  # the copy's methods are bound to the first
    return there


def gradients(model, prompts, completions):
    """Log-probabilities (P, G, T) and one vector of all gradients, on the CPU in float32."""
    logps = group_logprobs(model, prompts, *completions)
    weights = torch.linspace(-1, 1, logps.numel(), device=logps.device).view_as(logps)
    (logps * weights).sum().backward()
    flat = [parameter.grad.float().flatten().cpu() for parameter in model.parameters()]
    return logps.detach().cpu(), torch.cat(flat)


def test_float32_equals_the_cpu(device, model, prompts, completions):
    expected, expected_gradient = gradients(moved(model, "cpu"), prompts, completions)
    found, gradient = gradients(moved(model, device), prompts, completions)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-3, rtol=1e-3)


def test_bfloat16_keeps_the_direction_of_the_gradient(device, model, prompts, completions):
    _, expected = gradients(moved(model, "cpu"), prompts, completions)
    _, found = gradients(moved(model, device, torch.bfloat16), prompts, completions)
    assert torch.cosine_similarity(found, expected, dim=0) >= 0.999


def test_packed_equals_one_response_at_a_time_in_bfloat16(device, model, prompts, completions):
    there = moved(model, device, torch.bfloat16)
    ids, mask = completions
    with torch.no_grad():
        packed = group_logprobs(there, prompts, ids, mask)
        alone = torch.stack([
            torch.cat([group_logprobs(there, [prompt], ids[p : p + 1, g : g + 1],
                                      mask[p : p + 1, g : g + 1])[0] for g in range(3)])
            for p, prompt in enumerate(prompts)
        ])  # fmt: skip
    torch.testing.assert_close(packed, alone, atol=0.1, rtol=0)
    assert (packed - alone).abs().mean() < 0.02


def test_greedy_tokens_equal_those_of_the_cpu(device, model, tokenizer, prompts):
    keys = [[(0,)]] * len(prompts)
    here, there = (
        sample_groups(moved(model, where), tokenizer, prompts, keys, 12, top_p=1e-6)
        for where in ("cpu", device)
    )
    for mine, theirs in zip(here, there, strict=True):
        assert torch.equal(mine.completion_ids, theirs.completion_ids)
        torch.testing.assert_close(mine.sampler_logps, theirs.sampler_logps, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_is_the_policy(device, dtype, model, tokenizer, prompts):
    """Log-probabilities of the sampler and of the training pass, and the share of each token."""
    there = moved(model, device, dtype)
    keys = [[(0, row) for row in range(600)]]
    (rollout,) = sample_groups(there, tokenizer, prompts[:1], keys, 1)
    ids, mask = rollout.completion_ids[None], rollout.completion_mask[None]
    with torch.no_grad():
        logps = group_logprobs(there, prompts[:1], ids, mask)[0].cpu()
    gap = (logps - rollout.sampler_logps).abs()
    assert gap.mean() < (1e-5 if dtype == torch.float32 else 0.05)
    tokens, counts = ids.flatten().unique(return_counts=True)
    frequent = counts >= 20
    for token, count in zip(tokens[frequent], counts[frequent], strict=True):
        probability = float(logps.flatten()[ids.flatten() == token][0].exp())
        spread = (600 * probability * (1 - probability)) ** 0.5
        assert abs(int(count) - 600 * probability) < 5 * spread + 600 * 0.03 * probability


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharded_steps_and_gathered_weights(device, precision, folder, prompts, completions):
    """FSDP on one rank, with recomputed layers: two steps lower the loss, and `unsharded` gives
    the memory back."""
    with process_group(precision=precision) as world:
        model = load_model(
            folder, world.device, shard=lambda model: shard(model, world=world)
        )
        optimizer = make_optimizer(model, 1e-3, 0.0)
        losses = []
        for _ in range(3):
            loss = -group_logprobs(model, prompts, *completions).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[2] < losses[1] < losses[0]
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        before = torch.cuda.memory_allocated() if world.device.type == "cuda" else 0
        with unsharded(model):
            weight = next(model.model.language_model.layers.parameters())
            assert weight.dtype == world.dtype
        after = torch.cuda.memory_allocated() if world.device.type == "cuda" else 0
        assert after == before


def launch(script, folder, device, *flags):
    """A run in bfloat16: on two gloo ranks, or on one GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    num_ranks = "1"
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"], num_ranks = "", "2"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    shared = "--precision bf16 --num_workers 1 --max_frames 8 --prompts_per_step 4 --save_every 2"
    done = subprocess.run(
        [*torchrun, num_ranks, ROOT / f"{script}.py", *shared.split(), *flags],
        cwd=folder, env=environment, text=True, capture_output=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_both_stages_train_resume_and_export_in_bfloat16(device, toy_folder, tmp_path):
    data = toy_folder / "runs/toy/data"
    sft = ["--model", str(toy_folder / "runs/toy/base"), "--data", str(data / "sft.json")]
    rl = ["--model", "runs/sft/model", "--data", str(data / "rl.json"), "--max_new_tokens", "8",
          "--l_min", "2", "--l_max", "8"]  # fmt: skip
    for script, flags in (("train_sft", sft), ("train_rl", rl)):
        launch(script, tmp_path, device, *flags, "--max_steps", "3")
        output = launch(script, tmp_path, device, *flags, "--max_steps", "5")
        assert "resumed from" in output
        lines = (tmp_path / f"runs/{script[6:]}/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
        assert all(json.loads(line)["loss"] is not None for line in lines)
    exported = load_model(str(tmp_path / "runs/rl/model"), torch.device("cpu"))
    assert all(parameter.isfinite().all() for parameter in exported.parameters())


# ------------------------------------------------------------------------- what only CUDA can tell


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    return torch.device("cuda")


@pytest.mark.gpu
def test_cudnn_attention_is_off_and_a_masked_backward_is_finite(cuda):
    """pytorch issue 196678: NaN gradients where length % 128 is 64 and a row's logsumexp is low."""
    with process_group():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        shape = (8, 28, 320, 128)
        query = (torch.randn(shape, device=cuda, dtype=torch.bfloat16) * 30).requires_grad_()
        key, value = (torch.randn(shape, device=cuda, dtype=torch.bfloat16) for _ in range(2))
        mask = torch.ones(320, 320, dtype=torch.bool, device=cuda).tril()
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
        output.sum().backward()
        assert query.grad.isfinite().all()


@pytest.mark.gpu
def test_how_often_a_token_waits_for_the_device(cuda, model, tokenizer, prompts, record_property):
    """At most twice a token and row batch: a look whether all rows have ended, and no other."""
    there = moved(model, cuda, torch.bfloat16)
    keys = [[(0, row) for row in range(4)]] * len(prompts)
    sample_groups(there, tokenizer, prompts, keys, 4)  # kernels are loaded
    counts = {}
    for num_tokens in (8, 24):
        with pytest.warns(UserWarning) as waits:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                sample_groups(there, tokenizer, prompts, keys, num_tokens)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts[num_tokens] = len(waits)
    each = (counts[24] - counts[8]) / 16
    record_property("waits per token", each)
    assert each <= 2


@pytest.mark.gpu
def test_one_step_twice(cuda, model, prompts, completions, record_property):
    """Equal to rounding; whether bit for bit is recorded, not required (see the README)."""
    first, second = (
        gradients(moved(model, cuda, torch.bfloat16), prompts, completions)[1] for _ in range(2)
    )
    record_property("bit for bit", bool(torch.equal(first, second)))
    assert torch.cosine_similarity(first, second, dim=0) > 0.99999
