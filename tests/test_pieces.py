"""README's pieces to copy: each runs when pasted under exactly the imports and pieces of its row.

nn is torch.nn, F is torch.nn.functional, np is numpy.
"""

import copy
import dis
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import amago_min as am

IMPORTS = {"torch": "import torch", "nn": "import torch.nn as nn", "np": "import numpy as np",
           "F": "import torch.nn.functional as F", "math": "import math", "json": "import json",
           "dataclasses": "import dataclasses", "gymnasium": "import gymnasium"}
README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
TABLE = README.partition("Pieces to copy")[2].partition("\n## ")[0]
ROWS = {name: set(re.findall(r"`(\w+)`", needs))
        for name, needs in re.findall(r"^\| `(\w+)` \| .* \| ([^|]+) \|$", TABLE, re.M)}
ALONE = {"SigmaLinear", "KVCache", "PopArt", "Critics", "td_targets", "critic_loss",
         "actor_loss", "Trajectory"}


def source(name):
    return inspect.getsource(getattr(am, name))


def paste(name):
    """The piece, after its source ran in a namespace that holds nothing but what its row names."""
    needs = ROWS[name]
    lines = [IMPORTS[word] for word in needs & set(IMPORTS)]
    lines += [source(piece) for piece in (*sorted(needs - set(IMPORTS)), name)]
    namespace = {}
    exec(compile("\n\n".join(lines), f"{name}, pasted", "exec"), namespace)
    return namespace


def globals_of(code):
    """The names that a code object and those inside it look up outside of their functions."""
    inner = [globals_of(x) for x in code.co_consts if inspect.iscode(x)]
    return set().union(*inner, {step.argval for step in dis.get_instructions(code)
                                if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")})


# ---- each piece at work: a function of the namespace that it was pasted into ----


def sigma_linear(names):
    layer = names["SigmaLinear"](4, 3)
    layer(torch.ones(2, 4)).sum().backward()
    layer.eval().keep()
    assert layer(torch.ones(2, 4)).shape == (2, 3) and layer.weight.grad is not None


def kv_cache(names):
    cache = names["KVCache"](1, 2, 3, 9, 4)
    for ended in (None, np.array([True, False])):
        keys, values, valid = cache.append(0, *torch.ones(2, 2, 3, 4))
        assert valid.all()
        cache.end_step(ended)
    assert keys.shape == (2, 3, 2, 4) and cache.length.tolist() == [0, 2]
    valid = cache.append(0, *torch.ones(2, 2, 3, 4))[2]
    assert valid.tolist() == [[True, False, False], 3 * [True]]


def packing(names):
    rows = torch.tensor([[1, 2, 0], [3, 4, 5]])
    packing = names["Packing"](rows[:, 1:] > 0)
    assert packing.pack(rows).tolist() == [[1, 2, 3, 4, 5]] and packing.now.tolist() == [0, 2, 3]
    assert torch.equal(packing.unpack(packing.pack(rows)), rows)


def causal_attention(names):
    """Pasted attention and pasted cache give the same numbers."""
    attention, cache = names["CausalAttention"](8, 2).eval(), paste("KVCache")["KVCache"]
    x, angle = torch.randn(1, 4, 8), torch.arange(4.0)[None, :, None, None, None] * torch.ones(2)
    full, cache = attention(x, (angle.cos(), angle.sin())), cache(1, 1, 2, 4, 4)
    for t in range(4):
        here = angle[:, t:t + 1]
        y = attention(x[:, t:t + 1], (here.cos(), here.sin()), cache)
        cache.end_step()
        torch.testing.assert_close(y[:, 0], full[:, t], atol=1e-5, rtol=1e-5)


def stable_block(names):
    block, x = names["StableBlock"](8, 2, 16).eval(), torch.randn(2, 5, 8)
    changed = x.clone()
    changed[:, 3:] += 1
    angle = torch.arange(5.0)[None, :, None, None, None] * torch.ones(2)
    rotation = angle.cos(), angle.sin()
    torch.testing.assert_close(block(x, rotation)[:, :3], block(changed, rotation)[:, :3])


def popart(names):
    piece = names["PopArt"](2)
    raw = torch.randn(3, 2)
    piece.update(5 * torch.randn(3, 2), torch.tensor([True, True, False]))
    before = piece.denormalize(piece(raw))
    piece.update(5 + torch.randn(3, 2), torch.tensor([True, True, True]))
    torch.testing.assert_close(piece.denormalize(piece(raw)), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(piece.denormalize(piece.normalize(raw)), raw, atol=1e-4, rtol=1e-4)


def critics(names):
    s = torch.ones(5, 4)
    assert names["Critics"](4, 3, 2, 6, 8)(s).shape == (5, 6, 2, 3)
    continuous = names["Critics"](4, 3, 2, 6, 8, discrete=False)
    assert continuous(s, torch.ones(5, 3)).shape == continuous(s, torch.ones(5, 2, 3)).shape
    continuous.rescale(torch.ones(2), torch.zeros(2))


def td_targets(names):
    target = names["td_targets"](torch.ones(1, 2), torch.tensor([[False, True]]),
                                 torch.tensor([[[2., 4.], [2., 4.]]]), torch.tensor([.5, .9]))
    torch.testing.assert_close(target, torch.tensor([[[2., 4.6], [1., 1.]]]))


def critic_loss(names):
    q, target = torch.tensor([[[1., 2.], [3., 2.]]]), torch.tensor([[1., 4.]])
    assert names["critic_loss"](q, target) == (0 + 4 + 4 + 4) / 4


def actor_loss(names):
    value, log_prob = torch.tensor([[[1., 2.], [3., 0.]]]), torch.tensor([[-1., -8.]])
    online, offline = names["actor_loss"](value, log_prob, torch.tensor([[.1, -.1]]))
    assert (online, offline) == (-(1 + 0) / 2, 1 / 2)


def trajectory_of(names, T=3, **more):
    """T steps, with an instruction of two goals (they are 1 and 2) of which no step reached any."""
    obs = dict(vector=np.ones((T + 1, 2), np.float32),
               instruction=np.tile(np.int32([[2, 1], [1, 2]]), (T + 1, 1, 1)))
    return names["Trajectory"](obs, np.arange(T), np.zeros(T, np.float32), np.arange(T) == T - 1,
                               np.arange(T + 1) == 0, **more)


def trajectory(names):
    whole = trajectory_of(names)
    again = names["Trajectory"].of_tokens(whole.tokens())
    assert len(again) == 3
    np.testing.assert_equal(again.action, whole.action)


def relabel(names):
    """Steps that reached 5, then 2: asked for just that, the rollout has earned both rewards."""
    old = trajectory_of(names, achieved=np.int32([[[5]], [[2]], [[0]]]))

    def reward(instruction, progress, achieved):
        right = (achieved == instruction[progress]).all(-1).any()
        return float(right), progress + right

    def show(instruction, progress):
        status = np.clip(np.arange(2) - progress, -1, 1)[:, None]
        return np.concatenate([2 - status, instruction], -1)
    before = copy.deepcopy(old)
    new = names["relabel"](old, reward, show, np.random.default_rng(0), "all")
    assert new.reward.tolist() == [1, 1] and new.done.tolist() == [False, True]
    assert new.obs["instruction"][0, :, 1].tolist() == [5, 2] and new.success == 1
    np.testing.assert_equal(vars(old), vars(before))


def replay_buffer(names):
    spec = names["Spec"](vector=2, instruction=(2, 2, 9), actions=3, horizon=4)
    buffer = names["ReplayBuffer"](spec, 12, np.random.default_rng(0))
    for T in (3, 4, 3):
        buffer.add(trajectory_of(names, T))
    batch = buffer.sample(5, 2)
    assert len(buffer) == 2 and batch["mask"].shape == (5, 2) and batch["mask"].all()
    again = names["ReplayBuffer"](spec, 12, np.random.default_rng(0))
    state = copy.deepcopy(buffer.state())
    again.restore(state)
    np.testing.assert_equal(again.state(), state)
    with pytest.raises(names["UsageError"], match="the least is 5"):
        names["ReplayBuffer"](spec, 4, None)


AT_WORK = dict(SigmaLinear=sigma_linear, KVCache=kv_cache, Packing=packing,
               CausalAttention=causal_attention, StableBlock=stable_block, PopArt=popart,
               Critics=critics, td_targets=td_targets, critic_loss=critic_loss,
               actor_loss=actor_loss, Trajectory=trajectory, relabel=relabel,
               ReplayBuffer=replay_buffer)


@pytest.mark.parametrize("name", AT_WORK)
def test_a_piece_runs_when_pasted_under_what_its_row_names(name):
    """Catches a dependency that creeps into a piece which README offers for copying."""
    torch.manual_seed(0)
    AT_WORK[name](paste(name))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_names_all_that_is_needed_and_nothing_else(name):
    """Catches a need that only some branch has, and one that is a need no longer."""
    pieces = {name} | ROWS[name] - set(IMPORTS)
    read = set().union(*(globals_of(compile(source(x), x, "exec")) for x in pieces))
    ours = {x for x in vars(am) if not x.startswith("__")} | set(IMPORTS)
    assert read & ours | pieces == ROWS[name] | {name}


def test_the_contract():
    """Catches a piece without a row or a test, and one that needs another piece but should not."""
    assert set(ROWS) == set(AT_WORK) and ALONE < set(ROWS)
    for name in ALONE:
        assert ROWS[name] <= set(IMPORTS), name
    assert ROWS["relabel"] - set(IMPORTS) == {"Trajectory"}
    for name in re.search(r"steal a piece +(.+) run when pasted alone", am.__doc__)[1].replace(
            " and ", ", ").split(", "):
        assert name in ALONE
