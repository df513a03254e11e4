"""The same numbers on a GPU as on a CPU, and nothing that makes the program wait for it. Docstrings
name the bugs they catch. Without a GPU, what is recorded and replayed is tested on a CPU, which
does the same operations again, and the rest is skipped.
"""

import contextlib
import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions.utils import _standard_normal
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import amago_min as am
from envs import Recorded
from test_data import buffer_of
from test_losses import SPECS, both_kinds, make_agent, make_batch
from test_network import random_tokens

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
EVERYTHING = am.Spec(vector=3, image=(16, 16, 3), texture=(9, 7, 20), instruction=(3, 4, 30),
                     actions=5, horizon=9)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """One seed, and policies that take the mean: the two devices draw different numbers."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)       # three digits
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal",
                        lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device))


# ---- CUDA graphs, on a CPU too ----


def tensors(x):
    return [part for part in tree_leaves(x) if torch.is_tensor(part)]


def seen(x):
    """The same memory as it is seen now: unsqueeze_ and the like change only the tensor."""
    return tree_map(lambda part: part.detach() if torch.is_tensor(part) else part, x)


def memory(x):
    return {part.untyped_storage().data_ptr() for part in tensors(x)}


class GraphOnACPU(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph, and for torch.cuda.graph(it), where there is no GPU: keeps
    the operations that were called, and does them again on the same memory. As on a GPU, what is
    recorded is not computed, and a number that Python wants to know meanwhile is an error."""

    def __init__(self, graph=None):
        super().__init__()
        self.calls, self.before = graph.calls if graph else [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a GPU would be waited for while it records")
        if operation._schema.is_mutable:
            self.before += [(x.detach(), x.clone()) for x in tensors((args, kwargs))]
        given = seen((args, kwargs or {}))
        result = operation(*args, **(kwargs or {}))
        if torch.Tag.inplace_view not in operation.tags:     # those compute nothing
            self.calls.append((operation, *given, seen(result)))
        return result

    def __exit__(self, *problem):
        super().__exit__(*problem)
        with torch.inference_mode():
            for _, args, kwargs, result in self.calls:
                for x in tensors(result):
                    if not memory(x) & memory((args, kwargs)):   # neither a view nor in place
                        x.fill_(-77)
            for x, old in reversed(self.before):
                x.copy_(old)

    @torch.inference_mode()
    def replay(self):
        for operation, args, kwargs, result in self.calls:
            again = operation(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again)):
                if not memory(new) & memory((args, kwargs)):
                    old.copy_(new)


def on(device, batch):
    """The batch with all but its mask on the device, as ReplayBuffer.sample gives it."""
    return dict(am.each(lambda x: x.to(device), batch), mask=batch["mask"])


@pytest.fixture
def device(monkeypatch):
    """A GPU if there is one; else a CPU that records and replays as one would."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(torch.cuda, "CUDAGraph", GraphOnACPU)
    monkeypatch.setattr(torch.cuda, "graph", GraphOnACPU)
    monkeypatch.setattr(F, "one_hot", lambda x, n: (x[..., None] == torch.arange(n)).long())
    return "cpu"                                             # whose own one_hot checks its numbers


def recording(learner):
    """The Learner, made to record on a CPU too."""
    zero_grad = learner.optimizer.zero_grad
    learner.optimizer.zero_grad = lambda set_to_none: zero_grad(set_to_none=False)
    learner.gradient_again.usable = learner.step_again.usable = True
    return learner


def new_cache(agent, n_envs, context):
    cache = agent.transformer.new_cache(n_envs, context)
    cache.static = True
    cache.begin_step()
    return cache


def test_a_recorded_function_is_that_function(device):
    """Catches a replay with an earlier call's inputs or of other shapes, and a recording that is
    taken for a call."""
    calls, total = [], torch.zeros((), device=device)

    def double(inputs, name):
        calls.append(name)
        total.add_(1)
        return 2 * inputs["x"]
    recorded = Recorded(double, True)
    for i, size in enumerate([1, 2, 2, 2, 3, 2, 2, 2, 2, 2, 2, 3, 2]):
        x = torch.full((size,), float(i), device=device)
        assert recorded(dict(x=x), i).tolist() == [2.0 * i] * size, (i, size)
        assert bool(recorded.graph) == (8 <= i <= 10) and total == i + 1
    assert calls == [*range(9), 11, 12]
    plain = Recorded(double, False)
    for i in range(6):
        assert plain(dict(x=x), i).tolist() == [24.0, 24.0] and plain.graph is None


def test_half_a_recording_is_none(device):
    """Catches a replay of what was recorded before an error."""
    left, state = [RuntimeError("out of memory")], torch.zeros(2, device=device)

    def twice(inputs):
        state[0] += inputs["x"]
        if len(left) == 1 and calls == 3:
            raise left.pop()
        state[1] += inputs["x"]
    recorded = Recorded(twice, True)
    for calls in range(8):
        with contextlib.suppress(RuntimeError):
            recorded(dict(x=torch.ones((), device=device)))
    assert recorded.graph and state.tolist() == [7.0, 7.0]     # the fourth never ran


@both_kinds
def test_a_recorded_update_is_the_same_update(kind, device):
    """Catches a learning rate, a gradient or weights of the recording that later updates use, what
    moves in memory between two updates, and batches with padding that are taken for full ones."""
    config = am.Config(critics=3, gammas=(.5, .9, .99), amp="off", warmup=20)
    agent = make_agent(kind, n_step=2).to(device).eval()
    plain, fast = (am.Learner(copy.deepcopy(agent), config) for _ in range(2))
    plain.gradient_again.usable = plain.step_again.usable = False
    recording(fast)
    read = Recorded(lambda tokens: fast.average.trunk(tokens), True)
    for i in range(16):
        batch = on(device, make_batch(kind, (5, 3, 1) if i in (2, 9) else (5, 5, 5)))
        batch["tokens"]["reward"] += i                       # no two batches are alike
        expected, found = plain.update(batch), fast.update(batch)
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-4, msg=f"{i} {name}")
        assert bool(fast.gradient_again.graph) == (i in (6, 7, 8, 13, 14, 15))
        for _ in range(4 if i == 0 else 1):                  # recorded before the step is
            acted = read(batch["tokens"])
        expected = plain.average.trunk(batch["tokens"])
        torch.testing.assert_close(acted, expected, rtol=1e-3, atol=1e-4, msg=f"{i} acting")
    assert read.graph and fast.step_again.graph and not plain.step_again.graph
    for mine, other in ((plain.agent, fast.agent), (plain.average, fast.average)):
        for (name, p), q in zip(mine.state_dict().items(), other.state_dict().values()):
            torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4, msg=name)


def test_a_recorded_loss_that_is_not_finite_changes_nothing(device):
    """Catches statistics of a bad batch that a replay leaves behind, and an agent of NaN."""
    agent = make_agent("discrete").to(device).eval()
    learner = recording(am.Learner(agent, am.Config(critics=3, gammas=(.5, .9, .99))))
    for _ in range(5):
        learner.update(on(device, make_batch("discrete", (5, 5, 5))))
    before, batch = copy.deepcopy(agent.state_dict()), on(device, make_batch("discrete", (5, 5, 5)))
    batch["tokens"]["reward"][1, 2] = math.nan
    with pytest.raises(am.NonFiniteLoss):
        learner.update(batch)
    assert learner.gradient_again.graph
    assert all(torch.equal(x, before[name]) for name, x in agent.state_dict().items())
    info = learner.update(on(device, make_batch("discrete", (5, 5, 5))))
    assert all(x.isfinite() for x in info.values())


@both_kinds
def test_a_recorded_step_of_acting_draws_anew(kind, device, monkeypatch):
    """Catches a replay with the random numbers of the recording."""
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", _standard_normal)
    agent, tokens = make_agent(kind).to(device).eval(), random_tokens(SPECS[kind], 64, 1)
    cache, tokens = new_cache(agent, 64, 9), am.each(lambda x: x.to(device), tokens)
    act = Recorded(lambda tokens: agent.act(tokens, cache), True)
    assert len({str(act(tokens).tolist()) for _ in range(8)}) == 8 and act.graph


def test_cached_acting_equals_one_pass_over_the_rollout(device):
    """Catches a cache whose slots or masks are those of another step when that is replayed."""
    agent, steps = make_agent("discrete").to(device).eval(), []
    tokens = am.each(lambda x: x.to(device), random_tokens(SPECS["discrete"], 3, 10))
    cache = new_cache(agent, 3, 10)
    read = Recorded(lambda tokens: agent.trunk(tokens, cache), True)
    with torch.inference_mode():
        whole = agent.trunk(tokens)
        for t in range(10):
            steps.append(read(am.each(lambda x: x[:, t:t + 1], tokens)).clone())
            cache.end_step()
    assert read.graph
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-4)


# ---- a GPU against a CPU ----


def loss_and_gradients(agent, batch, device, amp=False):
    agent = copy.deepcopy(agent).to(device).train()
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        loss, info = agent(on(device, batch), torch.tensor([0, 1], device=device))
    loss.backward()
    return agent, loss, {name: p.grad.cpu() for name, p in agent.named_parameters()
                         if p.grad is not None}


@gpu
@both_kinds
def test_the_loss_and_its_gradients_are_those_of_a_cpu(kind):
    """Catches anything that a GPU computes differently, with padding and without."""
    for lengths in ((5, 3, 1), (5, 5, 5)):
        agent, batch = make_agent(kind, n_step=2), make_batch(kind, lengths)
        (mine, here, expected), (other, there, found) = (
            loss_and_gradients(agent, batch, device) for device in ("cpu", "cuda"))
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
        for name, x in other.named_buffers():            # PopArt, input norm, sigma
            torch.testing.assert_close(x.cpu(), dict(mine.named_buffers())[name], msg=name)


@gpu
def test_every_part_of_an_observation_is_read_alike():
    """Catches a picture, a map or an instruction that is laid out differently on a GPU."""
    agent = am.Agent(EVERYTHING, am.Config()).eval()
    tokens = random_tokens(EVERYTHING, 2, 6)
    tokens["obs"]["texture"] = torch.randint(20, (2, 6, 9, 7), dtype=torch.uint8)
    expected = agent.trunk(tokens)
    found = agent.to("cuda").trunk(am.each(lambda x: x.cuda(), tokens))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


@gpu
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


@gpu
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


@gpu
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


@gpu
def test_a_compiled_loss_is_the_same_loss():
    """Catches what a compiler makes of the loss, recorded, with another batch's numbers."""
    agent = make_agent("discrete", n_step=2).cuda()
    plain = am.Config(critics=3, gammas=(.5, .9, .99), amp="off")
    compiled = am.Config(**dict(vars(plain), compile=True))
    learners = [am.Learner(copy.deepcopy(agent).eval(), config) for config in (plain, compiled)]
    for i in range(6):
        batch = on("cuda", make_batch("discrete", (5, 5, 5)))
        batch["tokens"]["reward"] += i
        expected, found = (learner.update(batch) for learner in learners)
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-4, msg=name)


@gpu
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
