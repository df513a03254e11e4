"""The same numbers on a GPU, and nothing that makes the program wait for it. Skipped without one.

Everything else in tests/ runs on a GPU too where there is one, as --device auto picks it.
"""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import amago_min as am
from test_data import buffer_of
from test_losses import SPECS, both_kinds, make_agent, make_batch
from test_network import random_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
EVERYTHING = am.Spec(vector=3, image=(16, 16, 3), texture=(9, 7, 20), instruction=(3, 4, 30),
                     actions=5, horizon=9)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """One seed, and policies that take the mean: the two devices draw different numbers."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal",
                        lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device))


def on(device, batch):
    """The batch with all but its mask on the device, as ReplayBuffer.sample gives it."""
    return dict(am.each(lambda x: x.to(device), batch), mask=batch["mask"])


def loss_and_gradients(agent, batch, device, amp=False):
    agent = copy.deepcopy(agent).to(device).train()
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        loss, info = agent(on(device, batch), torch.tensor([0, 1], device=device))
    loss.backward()
    return agent, loss, {name: p.grad.cpu() for name, p in agent.named_parameters()
                         if p.grad is not None}


@both_kinds
def test_the_loss_and_its_gradients_are_those_of_a_cpu(kind):
    """Catches anything that a GPU computes differently, with padding and without."""
    for lengths in ((5, 3, 1), (5, 5, 5)):
        agent, batch = make_agent(kind), make_batch(kind, lengths)
        (mine, here, expected), (other, there, found) = (
            loss_and_gradients(agent, batch, device) for device in ("cpu", "cuda"))
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
        for name, x in other.named_buffers():            # PopArt, input norm, sigma
            torch.testing.assert_close(x.cpu(), dict(mine.named_buffers())[name], msg=name)


def test_every_part_of_an_observation_is_read_alike():
    """Catches a picture, a map or an instruction that is laid out differently on a GPU."""
    agent = am.Agent(EVERYTHING, am.Config()).eval()
    tokens = random_tokens(EVERYTHING, 2, 6)
    tokens["obs"]["texture"] = torch.randint(20, (2, 6, 9, 7), dtype=torch.uint8)
    expected = agent.trunk(tokens)
    found = agent.to("cuda").trunk(am.each(lambda x: x.cuda(), tokens))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


@both_kinds
def test_bfloat16_rounds_but_keeps_statistics_in_float32(kind):
    """Catches statistics, values or sigma in bfloat16, whose numbers have three digits."""
    agent, batch = make_agent(kind), make_batch(kind)
    exact, loss, gradients = loss_and_gradients(agent, batch, "cuda")
    rounded, other, _ = loss_and_gradients(agent, batch, "cuda", amp=True)
    assert loss != other and abs(loss - other) < 0.03 * abs(loss)
    buffers = dict(rounded.named_buffers())
    for name, x in exact.named_buffers():
        assert buffers[name].dtype == x.dtype != torch.bfloat16
        close = 2e-2 if name.startswith("popart") else 1e-6
        torch.testing.assert_close(buffers[name], x, rtol=close, atol=close, msg=name)


def test_attention_is_flash_attention(monkeypatch):
    """Catches a mask or a type with which attention would need T^2 memory."""
    agent, batch = make_agent("discrete").cuda().train(), on("cuda", make_batch("discrete"))
    with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        agent(batch)[0].backward()


def syncs_of(call):
    """How often, and where, a call waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{x.filename}:{x.lineno}" for x in caught if "synchroniz" in str(x.message)]


@both_kinds
def test_an_update_waits_for_the_gpu_once(kind):
    """Catches a hidden `.item()`: only the check for a finite gradient may wait."""
    spec = SPECS[kind]
    agent = am.Agent(spec, am.Config()).cuda().eval()
    learner = am.Learner(agent, am.Config())
    buffer, _ = buffer_of(spec, (9, 5, 7, 9))
    learner.update(buffer.sample(4, 9, "cuda"))
    batch = buffer.sample(4, 9, "cuda")
    assert syncs_of(lambda: learner.begin_update(batch)) == []
    assert len(syncs_of(learner.end_update)) == 1


def test_cached_acting_equals_one_pass_over_the_rollout():
    """Catches a cache whose slots or masks are those of another step on a GPU."""
    spec = SPECS["discrete"]
    agent, tokens = make_agent("discrete").cuda().eval(), random_tokens(spec, 3, 7)
    tokens = am.each(lambda x: x.cuda(), tokens)
    cache, steps = agent.transformer.new_cache(3, 9), []
    with torch.inference_mode():
        whole = agent.trunk(tokens)
        for t in range(7):
            steps.append(agent.trunk(am.each(lambda x: x[:, t:t + 1], tokens), cache))
            cache.end_step()
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-4)


def test_a_compiled_loss_is_the_same_loss():
    """Catches a graph that is replayed with another batch's numbers, rollouts of any length."""
    agent = make_agent("discrete").cuda()
    plain = am.Config(critics=3, gammas=(.5, .9, .99), amp="off")
    compiled = am.Config(**dict(vars(plain), compile=True))
    learners = [am.Learner(copy.deepcopy(agent).eval(), config) for config in (plain, compiled)]
    for lengths in ((5, 5, 5), (5, 5, 5), (5, 3, 1), (4, 2, 4), (5, 5, 5)):
        batch = on("cuda", make_batch("discrete", lengths))
        expected, found = (learner.update(batch) for learner in learners)
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-4, msg=name)


def test_the_main_job_on_a_gpu_goes_on_on_a_cpu(tmp_path):
    """Catches a run that does not learn there, or whose checkpoint only a GPU can read."""
    env, run = "popgym:RepeatPreviousEasy", tmp_path / "run"
    assert am.main(["--env", env, "--device", "cuda", "--out", str(run)]) == 0
    score = json.loads((run / "eval.json").read_text())
    assert score["return_mean"] >= 0.99 and score["env_steps"] < 100_000
    for device in ("cpu", "cuda"):
        _, agent, state = am.load_checkpoint(run, device)
        assert am.evaluate(agent, env, 16)["return_mean"] > 0.95
        steps = state["env_steps"] + 2000
        assert am.main(["--resume", str(run), "--device", device, "--env-steps",
                        str(steps), "--target-return", "none"]) == 0
    rows = (run / "log.csv").read_text().splitlines()
    assert np.isfinite(float(rows[-1].split(",")[3]))
