"""The network: stable Transformer, cache, timestep encoder. Docstrings name the bugs they catch.

Sizes are tiny and every weight is moved away from its initial value, so that no formula holds only
because a scale is still 1 or a bias still 0.
"""

import copy
import inspect
import math

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from amago_min import (CausalAttention, KVCache, Packing, RunningNorm, SigmaLinear,
                       Spec, StableBlock, TimestepEncoder, Transformer, rotate)

POSITIONS = ("rotary", "learnable", "sinusoidal", "both")
each_position = pytest.mark.parametrize("positions", POSITIONS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def shaken(module):
    """The module with all its scales, biases and tables far from their initial 1 and 0."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("qkv.gamma"):
                p.fill_(4.0)                            # sharp attention: mistakes become visible
            elif p.dim() != 2 or name.endswith("table"):
                p += 0.3 * torch.randn_like(p)
    return module.eval()


def transformer(positions="rotary", layers=2):
    return shaken(Transformer(16, layers, heads=2, ff=32, positions=positions, horizon=64))


def random_input(rollouts, T, start=0):
    """x (B, T, 16), time (B, T) that counts from `start`"""
    return torch.randn(rollouts, T, 16), torch.arange(start, start + T).repeat(rollouts, 1)


def acted(net, x, time, context):
    """What the network says of tokens (N, T, D) that come one by one, through a cache."""
    cache, outputs = net.new_cache(len(x), context), []
    for t in range(x.shape[1]):
        outputs.append(net(x[:, t:t + 1], time[:, t:t + 1], cache))
        cache.end_step()
    return torch.cat(outputs, dim=1)


def random_tokens(spec, rollouts=2, T=6, start=0):
    """T random tokens of each rollout, as TimestepEncoder takes them."""
    rng = np.random.default_rng(3)
    obs = {}
    if spec.vector:
        obs["vector"] = rng.normal(size=(rollouts, T, spec.vector)).astype(np.float32)
    if spec.image:
        obs["image"] = rng.integers(256, size=(rollouts, T) + spec.image, dtype=np.uint8)
    if spec.instruction:
        slots, words, vocabulary = spec.instruction
        obs["instruction"] = rng.integers(vocabulary, size=(rollouts, T, slots, words))
    action = (rng.integers(spec.actions, size=(rollouts, T)) if spec.discrete else
              rng.uniform(-1, 1, size=(rollouts, T, spec.actions)).astype(np.float32))
    return dict(obs={name: torch.from_numpy(x) for name, x in obs.items()},
                action=torch.from_numpy(action),
                reward=torch.from_numpy(rng.normal(size=(rollouts, T)).astype(np.float32)),
                reset=torch.from_numpy(rng.uniform(size=(rollouts, T)) < 0.3),
                time=torch.arange(start, start + T).repeat(rollouts, 1))


def mlp_input(encoder, tokens, learn=False):
    """What TimestepEncoder.mlp gets to read: the vector part, normalised, comes first."""
    seen = []
    handle = encoder.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(tokens, learn)
    handle.remove()
    return seen[0].detach()


# ----------------------------------------------------------------------------- T1 causality

@each_position
def test_the_future_changes_nothing(positions):
    """Catches attention that is not masked: a token that sees what comes after it."""
    net, (x, time) = transformer(positions), random_input(2, 9)
    other = x.clone()
    other[:, 5:] += torch.randn(2, 4, 16)
    before, after = net(x, time), net(other, time)
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-6, rtol=0)
    assert (before[:, 5:] - after[:, 5:]).abs().amin(dim=(0, 2)).min() > 1e-4


@each_position
def test_no_gradient_from_the_future(positions):
    """Catches a leak too small to see in the outputs: the gradient must be exactly zero."""
    net, (x, time) = transformer(positions), random_input(1, 7)
    x.requires_grad_(True)
    for t in (0, 3, 6):
        gradient, = torch.autograd.grad(net(x, time)[0, t].square().sum(), x)
        past, future = gradient[0, :t + 1], gradient[0, t + 1:]
        assert (future == 0).all()
        assert (past.abs().sum(-1) > 0).all(), "and it must see all of the past"


# ----------------------------------------------------------------------------- packed rollouts

def test_packing_by_hand():
    """Catches tokens in another order, a last token that counts as a step, padding that is kept."""
    packing = Packing(torch.tensor([[True, True, False], [True, True, True]]))
    rows = torch.tensor([[1, 2, 3, 99], [4, 5, 6, 7]])
    packed = packing.pack(rows)
    assert packed.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert packed[0, packing.now].tolist() == [1, 2, 4, 5, 6]
    assert packed[0, packing.now + 1].tolist() == [2, 3, 5, 6, 7]
    assert packing.unpack(packed).tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    full = Packing(torch.ones(2, 3, dtype=torch.bool))
    assert full.pack(rows).tolist() == [[1, 2, 3, 99, 4, 5, 6, 7]]
    assert full.unpack(full.pack(rows)).tolist() == rows.tolist()


@pytest.mark.parametrize("memory", [0, 3])
@each_position
def test_packed_rollouts_read_like_padded_ones(positions, memory):
    """Catches a token that sees another rollout, or the time or the window of another row."""
    net, (x, time) = transformer(positions), random_input(3, 9)
    net.memory, packing = memory, Packing(torch.arange(8) < torch.tensor([[8], [3], [6]]))
    packed = net(packing.pack(x), packing.pack(time), packing=packing)
    torch.testing.assert_close(packed, packing.pack(net(x, time)), atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------- T2 cache == full

@each_position
def test_cache_equals_full_forward_with_staggered_resets(positions):
    """Catches a wrong write slot, mask, scale or rotation in acting: the agent would play with
    another network than the one that learned. Rollouts start and end at different times."""
    net, lengths = transformer(positions), [[5, 12, 3, 5], [12, 1, 8, 4], [2, 11, 12]]
    cache, x = net.new_cache(3, context=12), random_input(3, 25)[0]
    ends = np.array([np.isin(np.arange(25), np.cumsum(row) - 1) for row in lengths])   # (N, 25)
    starts, outputs = np.zeros(3, int), []
    for t in range(25):
        time = torch.from_numpy(t - starts)[:, None]
        outputs.append(net(x[:, t:t + 1], time, cache))
        cache.end_step(ends[:, t])
        starts[ends[:, t]] = t + 1
    outputs = torch.cat(outputs, dim=1)
    for env, row in enumerate(lengths):
        for start, length in zip(np.cumsum([0] + row), row):
            here = slice(start, start + length)
            full = net(x[env:env + 1, here], torch.arange(length)[None])
            torch.testing.assert_close(outputs[env:env + 1, here], full, atol=1e-5, rtol=1e-5)


def test_nothing_leaks_over_a_reset():
    """Catches a cache that still attends to the rollout before: what is left of it is poisoned."""
    net, (x, time) = transformer(), random_input(2, 6)
    cache = net.new_cache(2, context=8)
    for t in range(6):
        net(x[:, t:t + 1], time[:, t:t + 1], cache)
        cache.end_step(np.array([t == 5, False]))       # env 0 starts over, env 1 goes on
    cache.keys[:, 0], cache.values[:, 0] = math.nan, 1e6
    full = net(x, time)
    for t in range(2):
        out = net(x[:, t:t + 1], torch.tensor([[t], [6 + t]]), cache)
        torch.testing.assert_close(out[0, 0], full[0, t], atol=1e-5, rtol=1e-5)
        assert out[1].isfinite().all()
        cache.end_step()


def test_unwritten_keys_stay_nan():
    """Catches a write into the wrong layer or environment, and an allocation that hides one."""
    net, (x, time) = transformer(), random_input(2, 3)
    cache = net.new_cache(2, context=8)
    assert cache.keys.isnan().all() and (cache.values == 0).all()
    for t in range(3):
        assert net(x[:, t:t + 1], time[:, t:t + 1], cache).isfinite().all()
        cache.end_step(np.array([False, t == 0]))
    assert cache.length.tolist() == [3, 2]
    written = ~cache.keys.isnan().any(-1)                               # (layers, N, H, context)
    assert written[:, 0].sum(-1).unique().tolist() == [3]
    assert written[:, 1].sum(-1).unique().tolist() == [2]


# ----------------------------------------------------------------------------- T3 sliding window

def test_the_picture_of_the_cache():
    """Catches a ring that evicts the wrong token: the drawing in KVCache's docstring, executed."""
    cache = KVCache(layers=1, n_envs=2, heads=1, context=4, d_head=1)
    for t in range(6):
        token = torch.full((2, 1, 1), float(t))
        cache.append(0, token, token)
        cache.end_step(np.array([t == 2, False]))       # env 0 starts over after its third token
        if t == 2:
            cache.keys[:, 0] = math.nan
    assert cache.length.tolist() == [3, 6]
    keys = cache.keys[0, :, 0, :, 0].tolist()
    assert keys[0][:3] == [3, 4, 5] and math.isnan(keys[0][3])
    assert keys[1] == [4, 5, 2, 3]


def test_one_layer_sees_exactly_the_last_context_tokens():
    """Catches a window that is one too long or too short, and positions counted from its start."""
    net, context = transformer(layers=1), 5
    x, time = random_input(2, 14, start=3)
    slid = acted(net, x, time, context)
    for t in range(14):
        window = slice(max(0, t + 1 - context), t + 1)
        full = net(x[:, window], time[:, window])[:, -1]
        torch.testing.assert_close(slid[:, t], full, atol=1e-5, rtol=1e-5)


def test_two_layers_remember_more_than_the_window():
    """Catches a docstring that is no longer true: equal up to the context, not beyond it."""
    net, context = transformer(layers=2), 5
    x, time = random_input(1, 8)
    slid = acted(net, x, time, context)
    torch.testing.assert_close(slid[:, :5], net(x[:, :5], time[:, :5]), atol=1e-5, rtol=1e-5)
    truncated = net(x[:, 3:], time[:, 3:])[:, -1]
    assert (slid[:, -1] - truncated).abs().max() > 1e-3


# ----------------------------------------------------------------------------- T4 SigmaLinear

def sigma_linear(iterations=0):
    """A layer whose weights have changed a lot since its u and v were right: now sigma is 5."""
    layer = SigmaLinear(12, 20)
    left, right = torch.linalg.qr(torch.randn(20, 12))[0], torch.linalg.qr(torch.randn(12, 12))[0]
    with torch.no_grad():
        layer.weight.copy_(left @ torch.diag(5 * 0.8 ** torch.arange(12)) @ right)
        layer.gamma.fill_(2.5)
    for _ in range(iterations):
        layer(torch.zeros(1, 12))
    return layer


def test_sigma_starts_exact():
    """Catches u and v that are random, or the wrong rows of the SVD, at the start."""
    for d_in, d_out in ((50, 80), (80, 50)):
        layer = SigmaLinear(d_in, d_out).eval()
        sigma = layer.u @ layer.weight @ layer.v
        torch.testing.assert_close(sigma, torch.linalg.svdvals(layer.weight)[0])
        assert layer.gamma == 1 and (layer.bias == 0).all()
        assert 0.019 < layer.weight.std() < 0.021


def test_power_iteration_finds_the_largest_singular_value():
    """Catches a power iteration that stalls or swaps u and v."""
    layer = sigma_linear(iterations=50)
    sigma = layer.u @ layer.weight @ layer.v
    torch.testing.assert_close(sigma, torch.linalg.svdvals(layer.weight)[0], atol=1e-3, rtol=0)


def test_spectral_norm_is_gamma():
    """Catches a weight that is not divided by sigma, or not multiplied by gamma."""
    layer = sigma_linear(iterations=50).eval()
    norm = torch.linalg.matrix_norm(layer.scaled_weight(), ord=2)
    torch.testing.assert_close(norm, torch.tensor(2.5), atol=1e-3, rtol=0)


def test_one_power_iteration_per_training_forward_and_none_in_eval():
    """Catches acting that changes the network, and sigma estimated from a stale u."""
    layer = sigma_linear()
    u, v = layer.u.clone(), layer.v.clone()
    acted = layer.eval().scaled_weight()
    torch.testing.assert_close(acted, 2.5 * layer.weight / (u @ layer.weight @ v))
    assert torch.equal(layer.u, u) and torch.equal(layer.v, v)
    layer.train()(torch.zeros(1, 12))
    new_u = F.normalize(layer.weight.detach() @ v, dim=0)
    torch.testing.assert_close(layer.u, new_u)
    torch.testing.assert_close(layer.v, F.normalize(layer.weight.detach().T @ new_u, dim=0))


def test_u_and_v_are_saved():
    """Catches a loaded agent that has another sigma, hence other weights, than the saved one."""
    layer, loaded = sigma_linear(iterations=3), SigmaLinear(12, 20)
    loaded.load_state_dict(layer.state_dict())
    x = torch.randn(5, 12)
    assert torch.equal(loaded.eval()(x), layer.eval()(x))


@torch.no_grad()
def test_acting_follows_every_change_of_the_weights():
    """Catches a weight kept for acting that is older than the last update or load. Fused AdamW is
    the trap: it changes parameters without counting up their `_version`."""
    layer, x = sigma_linear(iterations=1).eval(), torch.randn(2, 12)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    def update():
        with torch.enable_grad():
            layer.train()(x).square().sum().backward()
        layer.eval()
        optimizer.step()
    for change in (update, lambda: layer.gamma.mul_(2), lambda: layer.weight.mul_(torch.rand(12)),
                   lambda: layer.load_state_dict(SigmaLinear(12, 20).state_dict())):
        before = layer(x)
        change()
        weight = layer.gamma * layer.weight / (layer.u @ layer.weight @ layer.v)
        torch.testing.assert_close(layer(x), x @ weight.T + layer.bias)
        assert (layer(x) - before).abs().max() > 1e-3


def test_a_kept_weight_is_dropped_by_training():
    """Catches a loaded agent, whose weights are kept for acting, that learns nothing at all."""
    layer, x = sigma_linear(iterations=1).eval(), torch.randn(5, 12)
    layer.keep()
    layer.train()(x).square().sum().backward()
    assert layer.weight.grad.abs().max() > 0 and layer.gamma.grad.abs() > 0
    with torch.no_grad():
        layer.weight.mul_(torch.rand(12))
    assert torch.equal(layer.eval()(x), F.linear(x, layer.scaled_weight(), layer.bias))


def test_gradient_reaches_the_weight_through_sigma():
    """Catches a detached sigma, and u, v that carry a gradient of their own."""
    layer, x = sigma_linear(), torch.randn(5, 12)
    (layer(x) ** 3).sum().backward()
    weight = layer.weight.detach().clone().requires_grad_(True)
    u, v = layer.u.clone(), layer.v.clone()             # those of the forward above
    gamma = torch.tensor(2.5, requires_grad=True)
    ((x @ (gamma * weight / (u @ weight @ v)).T) ** 3).sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.gamma.grad, gamma.grad, rtol=1e-4, atol=1e-4)
    assert not layer.u.requires_grad and not layer.v.requires_grad


def test_two_training_forwards_before_one_backward():
    """Catches buffers written in place while an earlier forward still needs them."""
    layer, x = sigma_linear(), torch.randn(3, 12)
    (layer(x).sum() + layer(2 * x).sum()).backward()
    assert layer.weight.grad.isfinite().all()


def test_eval_equals_training_once_converged():
    """Catches a train and an eval path that compute different layers."""
    layer, x = sigma_linear(iterations=50), torch.randn(5, 12)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------- T5 attention, time

def softmax_attention(layer, x):
    """The same layer as loops over rollouts, heads and queries."""
    def linear(part):
        sigma = part.u @ part.weight @ part.v
        return part.gamma / sigma * part.weight
    B, T, D = x.shape
    d, y = D // layer.heads, torch.zeros(B, T, D)
    w_q, w_k, w_v = linear(layer.qkv).split(D)          # rows: first all queries, keys, values
    for b in range(B):
        for h in range(layer.heads):
            rows = slice(h * d, (h + 1) * d)
            for t in range(T):
                past = x[b, :t + 1]                     # (t + 1, D)
                score = (past @ w_k[rows].T) @ (w_q[rows] @ x[b, t]) / math.sqrt(d)
                y[b, t, rows] = layer.head_scale[h] * (score.softmax(0) @ (past @ w_v[rows].T))
    return y @ linear(layer.out).T + layer.out.bias


def test_attention_equals_explicit_softmax():
    """Catches mixed-up heads, a missing 1 / sqrt(d) or head scale, and a lost output bias."""
    layer, x = shaken(CausalAttention(16, heads=4)), random_input(2, 6)[0]
    torch.testing.assert_close(layer(x), softmax_attention(layer, x), atol=1e-5, rtol=1e-5)


def test_fresh_heads_see_one_token_of_a_hundred_in_layer_0_and_means_above():
    """Catches scores near 0 in all layers (a spread of .13 at gamma = 1): each fresh head takes a
    mean of the past, T-Maze's hint is 1 % of it and is never found. Far above 1, and a head would
    see a single token only; and with no head that takes a mean, counting is learned later."""
    x = F.layer_norm(torch.randn(500, 64), (64,))
    for layer, block in enumerate(Transformer(64, 2, 4, 128).blocks):
        q, k, _ = block.attention.qkv(x).view(500, 3, 4, 16).unbind(1)
        spread = (torch.einsum("ihd,jhd->hij", q, k) / 4).flatten(1).std(1)      # of each head
        low, high = (0.8, 2) if layer == 0 else (0, 0.3)
        assert low < spread.min() and spread.max() < high, (layer, spread)


def test_block_is_the_formula_of_its_docstring():
    """Catches a norm in the wrong place, a missing residual, and ReLU for LeakyReLU."""
    block, x = shaken(StableBlock(16, heads=2, ff=32)), random_input(2, 5)[0]
    h = x + block.norm2(block.attention(block.norm1(x)))
    expected = h + block.ff2(block.norm4(F.leaky_relu(block.ff1(block.norm3(h)), 0.01)))
    torch.testing.assert_close(block(x), expected)


def test_rotation_is_a_rotation_by_time():
    """Catches a wrong sign, or sin and cos swapped: compared with complex multiplication."""
    x, angle = torch.randn(2, 1, 5, 8), torch.randn(1, 1, 5, 4)
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), expected)


def test_rotary_knows_how_long_ago_but_not_when():
    """Catches an absolute position that slips in, and keys rotated unlike queries."""
    net, (x, time) = transformer("rotary"), random_input(2, 8)
    torch.testing.assert_close(net(x, time), net(x, time + 17), atol=1e-5, rtol=1e-4)
    assert (net(x, time) - net(x, 2 * time)).abs().max() > 1e-2, "the distance must matter"


@pytest.mark.parametrize("positions", ["learnable", "sinusoidal"])
def test_absolute_positions_are_those_of_the_episode(positions):
    """Catches position in the slice used for position in the episode, as slices are drawn."""
    net, (x, time) = transformer(positions), random_input(2, 6, start=30)
    if positions == "learnable":
        encoding = net.table[30:36]
    else:
        angle = torch.arange(30, 36)[:, None] / 10_000 ** (torch.arange(8) / 8)
        encoding = torch.cat([angle.sin(), angle.cos()], dim=-1)
    blind = copy.deepcopy(net)                          # the same network without positions
    blind.positions = "none"
    torch.testing.assert_close(net(x, time), blind(x + encoding, time), atol=1e-5, rtol=1e-5)


def test_both_is_rotary_on_top_of_sinusoidal():
    """Catches `both` that silently means only one of the two."""
    net, (x, time) = transformer("both"), random_input(1, 6, start=5)
    outputs = []
    for net.positions in ("both", "rotary", "sinusoidal"):
        outputs.append(net(x, time))
    assert all((outputs[0] - other).abs().max() > 1e-2 for other in outputs[1:])


# ----------------------------------------------------------------------------- T6 encoder, inputs

def test_the_vector_part_is_what_the_docstring_says():
    """Catches a part that is missing, unscaled, or in another step's place. (Before any update the
    input norm changes nothing.)"""
    spec = Spec(vector=3, actions=4, horizon=20)
    tokens = random_tokens(spec)
    seen = mlp_input(TimestepEncoder(spec, 16, 32), tokens)
    action = F.one_hot(tokens["action"], 4).float()
    action[:, 0] = 0                                    # there is no previous action at time 0
    expected = torch.cat([tokens["reset"][..., None].float(), tokens["reward"][..., None],
                          tokens["time"][..., None] / 20, action, tokens["obs"]["vector"]], -1)
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("spec", [Spec(vector=2, actions=3, horizon=9),
                                  Spec(vector=2, discrete=False, actions=3, horizon=9)],
                         ids=["discrete", "continuous"])
def test_previous_action_is_blank_at_time_0_only(spec):
    """Catches an action 0 made up at the start, and one that is blanked at the start of a slice."""
    encoder, tokens = shaken(TimestepEncoder(spec, 16, 32)), random_tokens(spec)
    action = tokens["action"]
    other = dict(tokens, action=(action + 1) % 3 if spec.discrete else -action)
    changed = (encoder(tokens) != encoder(other)).any(-1)
    assert changed.tolist() == [[False] + [True] * 5] * 2
    tokens["time"] += 1
    other["time"] = tokens["time"]
    assert (encoder(tokens) != encoder(other)).any(-1).all()


def test_order_of_words_and_of_slots_matters():
    """Catches an instruction read as a bag of words: `a then b` is not `b then a`."""
    spec = Spec(vector=1, instruction=(2, 3, 11), horizon=9)
    encoder, tokens = TimestepEncoder(spec, 16, 32), random_tokens(spec)
    words = torch.tensor([[1, 2, 3], [4, 5, 6]])
    outputs = []
    for order in (words, words.flip(1), words.flip(0)):
        tokens["obs"]["instruction"] = order.expand(2, 6, 2, 3)
        outputs.append(encoder(tokens))
    assert (outputs[0] - outputs[1]).abs().amin(dim=(0, 1)).max() > 1e-3
    assert (outputs[0] - outputs[2]).abs().amin(dim=(0, 1)).max() > 1e-3


def test_picture_goes_in_channels_first_and_scaled():
    """Catches a picture in the wrong memory order, unscaled, or with sides that 8 must divide."""
    spec = Spec(image=(9, 15, 3), horizon=9)
    encoder, tokens = TimestepEncoder(spec, 16, 32), random_tokens(spec)
    seen = []
    encoder.image.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    out = encoder(tokens)
    assert out.shape == (2, 6, 16) and seen[0].shape == (12, 3, 9, 15)
    picture = tokens["obs"]["image"][1, 2].float() / 128 - 1             # token 8 of the 12
    torch.testing.assert_close(seen[0][8, 1], picture[:, :, 1])
    out.square().sum().backward()
    assert encoder.image[0].weight.grad.abs().sum() > 0


def test_every_part_of_the_observation_is_read():
    """Catches a part that is encoded and then dropped."""
    spec = Spec(vector=3, image=(8, 8, 1), instruction=(1, 2, 5), horizon=9)
    encoder, tokens = shaken(TimestepEncoder(spec, 16, 32)), random_tokens(spec)
    base = encoder(tokens)
    for name, x in tokens["obs"].items():
        other = dict(tokens, obs=dict(tokens["obs"], **{name: x.flip(1)}))
        assert ((encoder(other) - base).abs().amax(-1) > 1e-5).all(), name


def test_multidiscrete_is_the_flattened_product():
    """Catches factors that are decoded in another order than they were encoded."""
    class Env:
        observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
        action_space = gymnasium.spaces.MultiDiscrete([2, 3])
        horizon = 7
    spec = Spec.of(Env)
    assert spec == Spec(vector=3, actions=6, nvec=(2, 3), horizon=7)
    assert [tuple(a) for a in spec.to_env(np.arange(6))] == list(np.ndindex(2, 3))
    assert all(Env.action_space.contains(a) for a in spec.to_env(np.arange(6)))


def test_spec_reads_every_kind_of_space():
    """Catches a vocabulary one too small, and a picture taken for a vector."""
    class Env:
        observation_space = gymnasium.spaces.Dict(
            image=gymnasium.spaces.Box(0, 255, (9, 8, 3), np.uint8),
            instruction=gymnasium.spaces.Box(0, 6, (4, 2), np.int64))
        action_space = gymnasium.spaces.Box(-1, 1, (5,), np.float32)
        horizon = 7
    assert Spec.of(Env) == Spec(image=(9, 8, 3), instruction=(4, 2, 7), discrete=False, actions=5,
                                horizon=7)
    Env.observation_space = Env.observation_space["image"]
    Env.action_space = gymnasium.spaces.Discrete(4)
    assert Spec.of(Env) == Spec(image=(9, 8, 3), actions=4, horizon=7)
    assert Spec.of(Env).to_env(np.array([3, 0])) == [3, 0]


def input_batches(number, dim=2):
    """Random inputs (5, 7, dim), each batch around another mean."""
    rng = np.random.default_rng(5)
    for i in range(number):
        yield rng.normal(3 + i, 1 + i, size=(5, 7, dim)).astype(np.float32)


def test_running_norm_is_the_formula_of_its_docstring():
    """Catches a first update that counts too little, and a mean over the wrong dimensions."""
    norm, mean, square = RunningNorm(2, beta=0.3), 0.0, 1.0
    for t, x in enumerate(input_batches(4), start=1):
        norm.update(torch.from_numpy(x))
        step = 0.3 / (1 - 0.7 ** t)
        mean = (1 - step) * mean + step * x.mean((0, 1))
        square = (1 - step) * square + step * (x ** 2).mean((0, 1))
        np.testing.assert_allclose(norm.mean, mean, rtol=1e-4)
        np.testing.assert_allclose(norm.square, square, rtol=1e-4)
    x = torch.from_numpy(x)
    expected = (x - norm.mean) / (norm.square - norm.mean ** 2).sqrt()
    torch.testing.assert_close(norm(x), expected.float())


def test_a_small_std_beside_a_large_mean_is_seen():
    """Catches statistics in float32, where E[x^2] - E[x]^2 cancels: std .1 beside 1000 became 0."""
    norm, x = RunningNorm(1), 1000 + 0.1 * torch.randn(4000, 1)
    norm.update(x)
    assert 0.9 < norm(x).std() < 1.1


def test_first_updates_are_plain_averages():
    """Catches statistics that crawl from their initial values: beta = 1e-4 alone would."""
    norm, batches = RunningNorm(2), list(input_batches(3))
    for x in batches:
        norm.update(torch.from_numpy(x))
    means = np.mean([x.mean((0, 1)) for x in batches], axis=0)
    squares = np.mean([(x ** 2).mean((0, 1)) for x in batches], axis=0)
    np.testing.assert_allclose(norm.mean, means, rtol=1e-3)
    np.testing.assert_allclose(norm.square, squares, rtol=1e-3)


def test_inputs_that_hardly_vary_are_only_centred():
    """Catches a constant input that is blown up, or divided by zero."""
    norm = RunningNorm(2)
    x = 0.5 + torch.randn(1000, 2) * torch.tensor([1e-4, 1.0])
    norm.update(x)
    torch.testing.assert_close(norm(x)[:, 0], x[:, 0] - norm.mean[0])
    assert 0.9 < norm(x)[:, 1].std() < 1.1


def test_what_is_first_met_late_does_not_drown_the_rest():
    """Catches a first reward after thousands of steps without one that reads as 900."""
    norm, x = RunningNorm(1), torch.zeros(1000, 1)
    for update in range(3000):
        norm.update(x)
    x[0] = 1.0
    for update in range(20):
        norm.update(x)
        assert norm(x).abs().max() <= 10
    assert (norm.square - norm.mean ** 2).sqrt() < 0.1 and norm(x)[0] == 10


def test_statistics_are_those_of_raw_inputs_and_come_first():
    """Catches statistics of inputs that were normalised already (a bug of the official code), and
    a first batch that goes in before it is counted."""
    spec = Spec(vector=1, horizon=9)
    encoder, tokens = TimestepEncoder(spec, 16, 32), random_tokens(spec)
    tokens["obs"]["vector"] = 50 + 5 * tokens["obs"]["vector"]
    seen = mlp_input(encoder, tokens, learn=True)[..., -1]
    assert seen.mean().abs() < 1e-3 and abs(seen.std(correction=0) - 1) < 1e-3
    encoder(tokens, learn=True)
    torch.testing.assert_close(encoder.norm.mean[-1].float(), tokens["obs"]["vector"].mean())


def test_statistics_change_only_while_learning():
    """Catches acting and evaluation that move the statistics."""
    spec = Spec(vector=1, horizon=9)
    encoder, tokens = TimestepEncoder(spec, 16, 32), random_tokens(spec)
    encoder(tokens)
    assert encoder.norm.count == 0 and (encoder.norm.mean == 0).all()
    encoder(tokens, learn=True)
    assert encoder.norm.count == 1


# ----------------------------------------------------------------------------- the contract


def test_signatures_and_buffers_of_the_contract():
    """Catches a renamed argument, parameter or buffer that other people's code relies on."""
    assert list(inspect.signature(SigmaLinear).parameters) == ["d_in", "d_out", "bias"]
    assert inspect.signature(SigmaLinear).parameters["bias"].default is True
    layer = SigmaLinear(5, 3)
    shapes = {name: tuple(x.shape) for name, x in layer.state_dict().items()}
    assert shapes == dict(weight=(3, 5), bias=(3,), gamma=(), u=(3,), v=(5,))
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "gamma"}
    assert SigmaLinear(5, 3, bias=False).bias is None


@pytest.mark.parametrize("width, heads", [(18, 4), (12, 4)])
def test_a_width_that_heads_cannot_share_is_refused(width, heads):
    """Catches a head of odd width: rotation takes dimensions in pairs."""
    with pytest.raises(AssertionError, match="even"):
        Transformer(width, 1, heads, 16)
