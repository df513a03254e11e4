"""Data: what the collector records, the buffer stores and the loss reads is what happened."""

import copy
import dataclasses
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import amago_min as am
import envs as environments
from probes import Choice, Choice1d, Constant, Count, Probe, use

SPECS = {
    "discrete": am.Spec(vector=3, actions=4, horizon=9),
    "continuous": am.Spec(vector=3, discrete=False, actions=2, horizon=9),
    "image and instruction": am.Spec(image=(9, 8, 3), instruction=(2, 3, 11), actions=4, horizon=9),
}


def rollout(spec, length, rng):
    """A random Trajectory."""
    obs = dict(vector=rng.normal(size=(length + 1, spec.vector)).astype(np.float32),
               image=rng.integers(256, size=(length + 1,) + spec.image, dtype=np.uint8),
               instruction=rng.integers(11, size=(length + 1,) + spec.instruction[:2]))
    action = rng.integers(spec.actions, size=length) if spec.discrete else \
        rng.uniform(-1, 1, size=(length, spec.actions)).astype(np.float32)
    return am.Trajectory({name: x for name, x in obs.items() if getattr(spec, name)}, action,
                         rng.normal(size=length).astype(np.float32),
                         np.arange(length) == length - 1, np.arange(length + 1) == 0)


def buffer_of(spec, lengths, capacity=1000, seed=0):
    buffer = am.ReplayBuffer(spec, capacity, np.random.default_rng(seed))
    trajectories = [rollout(spec, length, np.random.default_rng(length)) for length in lengths]
    for trajectory in trajectories:
        buffer.add(trajectory)
    return buffer, trajectories


def chi_square(counts):
    """How many standard deviations the counts are from uniform ones."""
    expected, freedom = np.mean(counts), len(counts) - 1
    return (np.sum((counts - expected) ** 2 / expected) - freedom) / np.sqrt(2 * freedom)


# ---- padding (T13) ----


def padded_batch(spec):
    """6 rollouts of 2 to 7 steps, hence with padding in all but the longest."""
    batch = buffer_of(spec, range(2, 8))[0].sample(6, context=9)
    assert not batch["mask"].all()
    return batch


def tensors(batch):
    """Every tensor of a batch."""
    flat = dict(batch, **batch["tokens"], **batch["tokens"]["obs"])
    return [x for x in flat.values() if torch.is_tensor(x)]


def change_tokens(batch, change):
    """The batch with change(tensor, mask of real entries) for every tensor, done included."""
    real = torch.nn.functional.pad(batch["mask"], (1, 0), value=True)    # (B, T+1)
    tokens = {name: change(x, real) for name, x in batch["tokens"].items() if name != "obs"}
    tokens["obs"] = {name: change(x, real) for name, x in batch["tokens"]["obs"].items()}
    return dict(tokens=tokens, done=change(batch["done"], real[:, 1:]), mask=batch["mask"])


def after_loss(agent, batch):
    """Loss, gradients and running statistics that a batch leads to."""
    torch.manual_seed(0)
    agent = copy.deepcopy(agent).train()
    loss, info = agent.loss(batch)
    loss.backward()
    return [loss.detach(), *info.values(), *agent.buffers(),
            *(p.grad for p in agent.parameters() if p.grad is not None)]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_padding_may_hold_anything(spec):
    """Catches padding that is multiplied by the mask (0 * NaN) or that reaches a statistic."""
    def poison(x, real):
        worst = {torch.bool: True, torch.uint8: 255}.get(
            x.dtype, np.nan if x.is_floating_point() else 10 ** 6)
        return torch.where(real.view(real.shape + (1,) * (x.dim() - 2)), x,
                           torch.tensor(worst, dtype=x.dtype))
    agent, batch = am.Agent(spec, am.Config()), padded_batch(spec)
    expected, got = after_loss(agent, batch), after_loss(agent, change_tokens(batch, poison))
    assert torch.isfinite(expected[0])
    assert all(torch.equal(a, b) for a, b in zip(expected, got))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_longer_padding_changes_nothing(spec, monkeypatch):
    """Catches a mean over all steps in place of the real ones."""
    def longer(x, real):
        return torch.cat([x, x[:, -1:].expand(-1, 5, *x.shape[2:])], dim=1)
    for name in ("sample", "rsample"):    # there would be more random numbers, hence other ones
        monkeypatch.setattr(torch.distributions.Normal, name, lambda self, shape=(): self.loc)
    agent, batch = am.Agent(spec, am.Config()), padded_batch(spec)
    padded = change_tokens(batch, longer)
    padded["mask"] = torch.nn.functional.pad(batch["mask"], (0, 5), value=False)
    expected, got = after_loss(agent, batch)[0], after_loss(agent, padded)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


# ---- alignment (T14) ----


def arrays_of(trajectory):
    """Everything in a Trajectory, by name."""
    return dict(trajectory.obs, action=trajectory.action, reward=trajectory.reward,
                reset=trajectory.reset, done=trajectory.done)


def row_of(batch, i):
    """Row i of a batch without its padding, in the shapes of a Trajectory."""
    length = int(batch["mask"][i].sum())
    tokens = {name: x[i, :length + 1].numpy() for name, x in
              dict(batch["tokens"], **batch["tokens"]["obs"]).items() if name != "obs"}
    return dict(tokens, action=tokens["action"][1:], reward=tokens["reward"][1:],
                done=batch["done"][i, :length].numpy())


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_trajectory_comes_back_exactly(spec):
    """Catches a field that is shifted, swapped with its neighbour's or cut short."""
    buffer, trajectories = buffer_of(spec, [1, 4, 9, 3])
    batch = buffer.sample(20, context=9)
    by_length = {len(t): arrays_of(t) for t in trajectories}
    assert {int(length) for length in batch["mask"].sum(1)} == set(by_length)
    for i in range(20):
        row = row_of(batch, i)
        np.testing.assert_array_equal(row.pop("time"), np.arange(len(row["reset"])))
        np.testing.assert_equal(row, by_length[len(row["reward"])])


def test_tokens_hold_the_previous_action_and_reward():
    """Catches the worst silent bug: token t that holds reward t, which it should predict; and a
    first token with the reward of an older rollout, of which the ring arrays are full."""
    spec = SPECS["discrete"]
    buffer, trajectory = buffer_of(spec, [])[0], rollout(spec, 9, np.random.default_rng(0))
    for name in ("action", "reward", "done"):
        buffer.tokens[name][:] = 1
    buffer.add(trajectory)
    tokens = buffer.sample(1, context=9)["tokens"]
    np.testing.assert_array_equal(tokens["reward"][0], [0, *trajectory.reward])
    np.testing.assert_array_equal(tokens["action"][0], [0, *trajectory.action])


def test_slices_of_long_rollouts_keep_their_place():
    """Catches a slice whose clock restarts, that forgets what led to its first token, or that
    starts in some places more often than in others."""
    buffer, (trajectory,) = buffer_of(SPECS["discrete"], [9])
    batch = buffer.sample(6000, context=4)
    tokens, start = batch["tokens"], batch["tokens"]["time"][:, 0]
    at = start[:, None] + torch.arange(5)
    assert batch["mask"].shape == (6000, 4) and batch["mask"].all()
    np.testing.assert_array_equal(tokens["time"], at)
    np.testing.assert_array_equal(tokens["obs"]["vector"], trajectory.obs["vector"][at])
    np.testing.assert_array_equal(tokens["reward"], np.append(0, trajectory.reward)[at])
    np.testing.assert_array_equal(tokens["action"], np.append(0, trajectory.action)[at])
    np.testing.assert_array_equal(batch["done"], trajectory.done[at[:, :-1]])
    counts = np.bincount(start)
    assert len(counts) == 6 and chi_square(counts) < 4


# ---- collector (T14) ----

ENVS = ["gym:CartPole-v1?horizon=25", "gym:Pendulum-v1?horizon=10", "popgym:MineSweeperEasy",
        "meta:popgym:MineSweeperEasy?episodes=3", Constant, Count]   # 1 step; 1 to 9 steps


def collect(env, steps, n_envs=3, act=None, **options):
    """Per environment, the trajectories of a collector with noisy actions."""
    spec = am.Spec.of(am.environments.make_env(env))
    agent = am.Agent(spec, am.Config()).eval()
    agent.act = act or agent.act
    noise = am.Exploration(spec, n_envs, 10 ** 6, np.random.default_rng(0))
    collector = am.Collector(env, n_envs, agent, 1024, 7, noise, **options)
    out = [[] for _ in range(n_envs)]
    for _ in range(steps):
        for i, trajectory in collector.step():
            out[i].append(trajectory)
    assert collector.env_steps == steps * n_envs and all(out)
    return out


def raw_action(space, action):
    """Our action as the environment's: the last factor of a MultiDiscrete changes fastest."""
    if not hasattr(space, "nvec"):
        return action
    digits = []
    for n in reversed(space.nvec):
        action, digit = divmod(int(action), int(n))
        digits.insert(0, digit)
    return np.array(digits)


def replay(env, trajectory, bootstrap_truncated):
    """Play the trajectory's actions in env, in a plain loop, and write down what happens."""
    obs, reward, done, reset = [env.reset()[0]], [], [], [True]
    for action in trajectory.action:
        step = env.step(raw_action(env.action_space, action))
        obs.append(step[0])
        reward.append(step[1])
        done.append(step[2] or (step[3] and not bootstrap_truncated))
        reset.append(step[4].get("reset", False))
    assert step[2] or step[3]
    return dict(vector=np.array(obs), action=trajectory.action, reward=np.float32(reward),
                done=np.array(done), reset=np.array(reset))


@pytest.mark.parametrize("bootstrap", [False, True], ids=["", "bootstrap_truncated"])
@pytest.mark.parametrize("env", ENVS)
def test_collector_equals_a_plain_loop(monkeypatch, env, bootstrap):
    """Catches environments that get each other's data or lose their seed, a last observation
    that is already the next rollout's, leftovers of a longer rollout in a shorter one."""
    if not isinstance(env, str):
        use(monkeypatch, env)
        env = "probe"
    for i, trajectories in enumerate(collect(env, 120, bootstrap_truncated=bootstrap)):
        twin = am.environments.make_env(env, seed=7 + i)
        for trajectory in trajectories:
            np.testing.assert_equal(arrays_of(trajectory), replay(twin, trajectory, bootstrap))


def test_a_time_limit_ends_values_unless_asked_otherwise():
    """Catches `done` that ignores truncation, or that follows it when bootstrapping is on."""
    for bootstrap in (False, True):
        trajectories = sum(collect("gym:Pendulum-v1?horizon=10", 20, bootstrap_truncated=bootstrap),
                           start=[])
        assert all(t.done.tolist() == [False] * 9 + [not bootstrap] for t in trajectories)


def test_acting_and_training_read_the_same_tokens(monkeypatch):
    """Catches an agent that acts on other inputs than it learns from."""
    env = use(monkeypatch, Count)
    seen = []

    def act(tokens, cache):
        seen.append(copy.deepcopy(tokens))
        return torch.ones(1, dtype=torch.int64)
    (trajectories,) = collect("probe", 60, n_envs=1, act=act)
    start = 0
    for trajectory in trajectories:
        buffer = am.ReplayBuffer(am.Spec.of(env), 100, np.random.default_rng(0))
        buffer.add(trajectory)
        trained = buffer.sample(1, context=9)["tokens"]
        for t in range(len(trajectory)):                  # the last token is never acted on
            acted = seen[start + t]
            assert torch.equal(acted["obs"]["vector"][0, 0], trained["obs"]["vector"][0, t])
            for name in ("action", "reward", "reset", "time"):
                assert acted[name].dtype == trained[name].dtype
                assert acted[name].item() == trained[name][0, t].item(), (name, t)
        start += len(trajectory)


def test_acting_and_training_know_the_same(monkeypatch):
    """Catches a cache that is not emptied when a rollout ends, or is emptied for all of them:
    what the agent knew when it acted is what training computes from the finished rollout."""
    spec = am.Spec.of(use(monkeypatch, Count))
    agent, knew, trunk = am.Agent(spec, am.Config()).eval(), [], am.Agent.trunk

    def record(tokens, cache=None):
        knew.append(trunk(agent, tokens, cache=cache)[:, 0])              # (N, D)
        return knew[-1].unsqueeze(1)
    agent.trunk = record
    collector, start = am.Collector("probe", 3, agent, 1024, 7), [0, 0, 0]
    for step in range(1, 40):
        for i, trajectory in collector.step():
            buffer = am.ReplayBuffer(spec, 100, np.random.default_rng(0))
            buffer.add(trajectory)
            with torch.no_grad():
                expected = trunk(agent, buffer.sample(1, context=9)["tokens"])[0, :-1]
            got = torch.stack([s[i] for s in knew[start[i]:step]])        # (T, D)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            start[i] = step


# ---- buffer (T15) ----

NUMBERED = am.Spec(vector=1, actions=2, horizon=15)


def numbered(name, length):
    """A trajectory whose observations all are `name`."""
    return am.Trajectory(dict(vector=np.full((length + 1, 1), name, np.float32)),
                         np.zeros(length, int), np.zeros(length, np.float32),
                         np.zeros(length, bool), np.zeros(length + 1, bool))


def contents(buffer):
    """The observations of every stored trajectory, oldest first."""
    ring = (buffer.first + np.arange(buffer.count)) % len(buffer.starts)
    return [buffer.tokens["obs"]["vector"][start:start + length + 1, 0].tolist()
            for start, length in zip(buffer.starts[ring], buffer.lengths[ring])]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 15), min_size=1, max_size=60),
       capacity=st.integers(16, 60))
def test_the_oldest_make_room(lengths, capacity):
    """Catches an eviction that is too late (overlaps), too early, or of the wrong trajectory.

    The model is a list of cells with their owners: a trajectory goes to the next cells or, where
    the rest is too short, to the first ones; it lives until one of its cells is needed.
    """
    buffer = am.ReplayBuffer(NUMBERED, capacity, np.random.default_rng(0))
    cells, write, alive = [None] * capacity, 0, []
    for name, length in enumerate(lengths):
        buffer.add(numbered(name, length))
        needed = set(range(write, min(write + length + 1, capacity)))
        if write + length + 1 > capacity:
            needed, write = needed | set(range(length + 1)), 0
        for owner in {cells[i] for i in needed} - {None}:
            cells = [None if cell == owner else cell for cell in cells]
            alive.remove(owner)
        cells[write:write + length + 1] = [name] * (length + 1)
        alive.append(name)
        write += length + 1
        assert contents(buffer) == [[i] * (lengths[i] + 1) for i in alive]
        assert alive == list(range(alive[0], name + 1)) and len(buffer) == len(alive)


def test_trajectories_are_drawn_uniformly():
    """Catches a draw that misses the newest or the oldest, or prefers long ones."""
    buffer = am.ReplayBuffer(NUMBERED, 100, np.random.default_rng(0))
    for name in range(50):                # 15 of 50 remain, so that the ring starts in its middle
        buffer.add(numbered(name, 9 if name % 2 else 2))
    drawn = [buffer.sample(1000, context=5)["tokens"]["obs"]["vector"][:, 0, 0].numpy()
             for _ in range(10)]
    names, counts = np.unique(np.concatenate(drawn), return_counts=True)
    assert names.tolist() == [rollout[0] for rollout in contents(buffer)]
    assert chi_square(counts) < 4


def test_nobody_can_spoil_the_buffer_from_outside():
    """Catches views: of the trajectory handed in, and of the arrays in what is handed out."""
    buffer, (trajectory,) = buffer_of(SPECS["discrete"], [9])
    expected = copy.deepcopy(arrays_of(trajectory))
    for x in arrays_of(trajectory).values():
        x[:] = 1
    batch = buffer.sample(2, context=9)
    np.testing.assert_equal(row_of(batch, 0), dict(expected, time=np.arange(10)))
    for x in tensors(batch):
        x.fill_(1)
    np.testing.assert_equal(row_of(buffer.sample(2, context=9), 0),
                            dict(expected, time=np.arange(10)))


def test_learning_leaves_the_batch_alone():
    """Catches a loss that writes into sampled data, which may be looked at or used again."""
    for spec in SPECS.values():
        for batch in padded_batch(spec), buffer_of(spec, [5, 5])[0].sample(2, context=9):
            before = copy.deepcopy(batch)
            am.Agent(spec, am.Config()).loss(batch)[0].backward()
            assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(before)))


# ---- exploration ----

@pytest.mark.parametrize("time, env_steps, epsilon", [
    (0, 0, 1.0), (9, 0, 0.8), (0, 1000, 0.05), (9, 1000, 0.01), (9, 5000, 0.01),
    (4.5, 500, 0.465)])                   # halfway: (1 + .05) / 2 = .525, (.8 + .01) / 2 = .405
def test_epsilon(time, env_steps, epsilon):
    """Catches noise that is not annealed, over training or over the rollout."""
    noise = am.Exploration(SPECS["discrete"], 1, 1000, np.random.default_rng(0))
    noise.plan[:] = [[0.5], [0.0]]
    assert noise.epsilon(np.array([time]), env_steps) == pytest.approx(0.5 * epsilon)


@pytest.mark.parametrize("length, steps", [(1, 200_000), (100, 200_000), (300, 600_000)])
def test_noise_fades_over_2000_rollouts(length, steps):
    """Catches noise that is gone before a long corridor has been walked often enough, or that lasts
    as long as if no rollout ever ended early; by hand: 2000 rollouts of 300 steps, >= 200 000."""
    noise = am.Exploration(dataclasses.replace(SPECS["discrete"], horizon=10 ** 6), 1, 0,
                           np.random.default_rng(0))
    for share in (.5, 1):
        for _ in range(int(share * steps / length) - noise.begun):
            noise.reset(np.array([True]), np.array([length]), 0)
        noise.plan[:] = [[1.0], [0.0]]
        assert noise.epsilon(np.array([0]), share * steps) == pytest.approx(1 - .95 * share)


def test_noise_lasts_until_something_is_found():
    """Catches noise that is over when hardly any rollout got a reward: in wind nothing was met in
    400 000 env steps after; and rollouts under way, of which there may be many, that count as if
    they had got one. By hand: one of 40 did, and 1 is added: .41 of the way after 1600; after 4000
    more than all that is asked for. Not if a number is given."""
    for n_envs in (1, 400):
        for anneal, after, share in ((0, 1600, .41), (0, 4000, 1), (10 ** 7, 1600, .1)):
            noise = am.Exploration(SPECS["discrete"], n_envs, anneal, np.random.default_rng(0))
            for i in range(after):
                noise.reset(np.arange(n_envs) == 0, np.full(n_envs, 9), int(i % 40 > 0))
            noise.plan[:] = [[1.0], [0.0]]
            assert noise.epsilon(np.zeros(n_envs), 10 ** 6) == pytest.approx(
                np.full(n_envs, 1 - .95 * share))


def test_noise_that_begins_late():
    """Catches noise before step b, and a fading that does not begin there; horizon 9, b = 6."""
    noise = am.Exploration(SPECS["discrete"], 1, 1000, np.random.default_rng(0))
    noise.plan[:] = [[0.5], [6.0]]
    got = [float(noise.epsilon(np.array([time]), 0)[0]) for time in (0, 5, 6, 9)]
    assert got == pytest.approx([0, 0, .5, .5 * (1 - .2 * 3 / 9)])


def test_where_noise_begins():
    """Half of the rollouts at once, the others 9^u steps before the end, u ~ U(0, 1): half of those
    in the last 3 steps. Catches a late beginning that is uniform, or never the last step."""
    noise = am.Exploration(SPECS["discrete"], 40_000, 1000, np.random.default_rng(0))
    multiplier, begin = noise.plan
    assert (begin == 0).mean() == pytest.approx(0.5, abs=0.01)
    assert (begin > 6).mean() == pytest.approx(0.25, abs=0.01) and 7.9 < begin.max() <= 8
    assert multiplier.min() < .01 and multiplier.max() > .99
    assert abs(np.corrcoef(multiplier, begin)[0, 1]) < .02


def test_continuous_noise_begins_at_once():
    """Catches rollouts without noise where actions are continuous: there it shows most states with
    one action only, and critics are asked about others."""
    noise = am.Exploration(SPECS["continuous"], 1000, 1000, np.random.default_rng(0))
    assert not noise.plan[1].any() and len(set(noise.plan[0])) == 1000
    noise.reset(np.ones(1000, bool), np.full(1000, 9), 0)
    assert not noise.plan[1].any() and len(set(noise.plan[0])) == 1000


def test_noise_begins_within_a_rollout_as_long_as_the_last_one():
    """Catches a beginning drawn over the horizon, 9 steps, which short rollouts never live to see:
    now they last 1 to 4."""
    noise = am.Exploration(SPECS["discrete"], 40_000, 1000, np.random.default_rng(0))
    length = np.arange(40_000) % 4 + 1
    noise.reset(np.ones(40_000, bool), length, 0)
    begin = noise.plan[1]
    assert (begin == 0)[length > 1].mean() == pytest.approx(0.5, abs=0.01)
    assert (begin <= length - 1).all() and begin[length == 4].max() > 2.9


def test_the_collector_tells_how_long_the_rollout_was():
    """Catches the length of another environment's rollout, or 0, that of the one that begins."""
    spec, told = am.Spec.of(am.environments.make_env("meta:popgym:MineSweeperEasy?episodes=3")), []
    torch.manual_seed(0)
    agent = am.Agent(spec, am.Config()).eval()
    noise = am.Exploration(spec, 3, 10 ** 6, np.random.default_rng(0))
    noise.reset = lambda ended, length, barren: told.append(length[ended].tolist())
    collector = am.Collector("meta:popgym:MineSweeperEasy?episodes=3", 3, agent, 1024, 7, noise)
    for _ in range(60):
        finished = collector.step()
        assert told[-1] == [len(trajectory) for _, trajectory in finished]
    assert {1, 2, 3} & set(map(len, told)) and len(set(sum(told, []))) > 1


def test_new_rollouts_get_new_noise():
    """Catches one amount of noise for ever, and a change of it within a rollout."""
    noise = am.Exploration(SPECS["discrete"], 4, 1000, np.random.default_rng(0))
    before = noise.plan.copy()
    noise.reset(np.array([True, False, True, False]), np.full(4, 9), 1)
    assert (noise.plan[0] != before[0]).tolist() == [True, False, True, False]
    assert (noise.plan[1] == before[1])[[1, 3]].all()


def test_share_of_greedy_actions():
    """Catches epsilon and 1 - epsilon swapped, and noise that leaves out some actions."""
    noise = am.Exploration(SPECS["discrete"], 40_000, 1000, np.random.default_rng(0))
    noise.plan[:] = [[0.6], [0.0]]
    counts = np.bincount(noise(np.full(40_000, 2), np.zeros(40_000), 0)) / 40_000
    assert counts == pytest.approx([.15, .15, 1 - .6 + .15, .15], abs=0.01)


def test_continuous_noise():
    """Catches actions outside the space, and noise of the wrong size."""
    noise = am.Exploration(SPECS["continuous"], 20_000, 1000, np.random.default_rng(0))
    noise.plan[:] = [[0.2], [0.0]]
    action = noise(np.full((20_000, 2), .9, np.float32), np.zeros(20_000), 0)
    assert action.dtype == np.float32 and action.max() == 1 and action.min() > -1
    small = noise(np.zeros((20_000, 2), np.float32), np.zeros(20_000), 0)
    assert small.std(0) == pytest.approx([.2, .2], abs=0.01)


# ---- evaluate ----


class LongOrShort(Probe):
    """Rollouts of 1 step that pay 0 with even seeds, of 9 steps that pay 1 in all with odd ones."""
    horizon = 9

    def reset(self, *, seed=None, options=None):
        self.long = self.np_random_seed % 2
        return super().reset(options=options)

    def step(self, action):
        observation, _, end, _, info = super().step(action)
        return observation, float(end), end or not self.long, False, info


def agent_of(env):
    return am.Agent(am.Spec.of(env), am.Config()).eval()


def test_short_episodes_do_not_count_more(monkeypatch):
    """Catches an evaluation of the first n episodes to end: 8 of the short ones, return 0."""
    agent = agent_of(use(monkeypatch, LongOrShort))
    score = am.evaluate(agent, "probe", 8, max_envs=4)
    assert (score["return_mean"], score["return_std"], score["episodes"]) == (0.5, 0.5, 8)


@pytest.mark.parametrize("episodes", [1, 3, 5, 40])
def test_as_many_episodes_as_asked(episodes, monkeypatch):
    """Catches 40 episodes that become 64: each environment's number is fixed beforehand, and they
    differ by one at most."""
    agent, played = agent_of(use(monkeypatch, LongOrShort)), []
    receive = am.Collector.receive
    monkeypatch.setattr(am.Collector, "receive", lambda self: (
        played.append(receive(self)), played[-1])[1])
    assert am.evaluate(agent, "probe", episodes, max_envs=32)["episodes"] == episodes
    last = [i for i, _ in played[-1]]                # the last one is waited for, long or short
    assert max(last) < episodes


def test_evaluation_adds_no_noise(monkeypatch):
    """Catches exploration during evaluation."""
    agent = agent_of(use(monkeypatch, Choice, horizon=3))
    agent.act = lambda tokens, cache: torch.ones(len(tokens["time"]), dtype=torch.int64)
    score = am.evaluate(agent, "probe", 64)
    assert (score["return_mean"], score["return_std"]) == (3, 0)


def test_summary_tells_when_each_goal_was_done():
    """Two episodes that ask for two goals and one that asks for one; by hand: the first goal is
    done in 2 of 3 after 2 and 4 steps, the second in 1 of the 2 that have one, after 5."""
    def episode(goals, *done):
        words = np.zeros((6, 3, 2), np.int32)
        words[:, :goals, 0] = 1
        reward = np.isin(np.arange(1, 6), done).astype(np.float32)
        return types.SimpleNamespace(reward=reward, reset=np.zeros(6, bool), success=0.0,
                                     obs={"instruction": words})
    score = environments.summary([episode(2, 2, 5), episode(1, 4), episode(2)])
    assert score["goals"] == [(2 / 3, 3.0), (1 / 2, 5.0)]
    assert environments.in_words(score).splitlines()[1:] == [
        "  goal 1: done in 0.667 of the episodes that ask for it, after 3.0 steps on average",
        "  goal 2: done in 0.500 of the episodes that ask for it, after 5.0 steps on average"]


@pytest.mark.parametrize("successes, expected", [
    ([1, np.nan, 1, np.nan], .5), ([1, 0], .5), ([np.nan, np.nan], np.nan)], ids=str)
def test_an_episode_without_a_success_is_none_where_others_have_one(successes, expected):
    """Catches a column that is empty, or 1, where only successes are named."""
    score = environments.summary([types.SimpleNamespace(
        reward=np.ones(2), reset=np.zeros(3, bool), success=x, obs={}) for x in successes])
    np.testing.assert_equal(score["success"], expected)


def test_goals_of_inner_episodes_are_counted_in_each():
    """Two rollouts of two inner episodes, by hand: the first goal is done in 3 of 4, after 2, 3 and
    1 steps; the second in 1 of the 3 that ask for it, after 3."""
    def rollout(goals, resets, done):
        words, reset = np.zeros((9, 3, 2), np.int32), np.zeros(9, bool)
        for begin, end, count in zip([0, *resets], [*resets, 9], goals):
            words[begin:end, :count, 0] = 1
        reset[[0, *resets]] = True
        return types.SimpleNamespace(reward=np.isin(np.arange(1, 9), done).astype(np.float32),
                                     reset=reset, success=0.0, obs={"instruction": words})
    score = environments.summary([rollout([2, 2], [4], [2, 3, 7]), rollout([1, 2], [5], [6])])
    assert score["goals"] == [(3 / 4, 2.0), (1 / 3, 3.0)]
    assert score["inner_returns"] == [1.0, 1.0]
    env = environments.make_env("meta:maze:5x5?goals=2&episodes=3")
    goals = am.evaluate(agent_of(env), env.name, 4)["goals"]
    assert all(share <= 1 for share, _ in goals)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_mode(monkeypatch, training):
    """Catches an evaluation that leaves power iteration switched off, or on."""
    agent = agent_of(use(monkeypatch, Choice)).train(training)
    am.evaluate(agent, "probe", 2)
    assert agent.training == training


def test_evaluation_depends_on_its_seed_alone(monkeypatch):
    """Catches an evaluation that cannot be repeated."""
    agent = agent_of(use(monkeypatch, Choice1d, horizon=3))
    one, again, two = (am.evaluate(agent, "probe", 8, seed=seed)["return_mean"]
                       for seed in (1, 1, 2))
    assert one == again != two


def test_evaluation_leaves_the_training_alone(monkeypatch):
    """Catches an --eval-every that changes what is learned, through torch's random numbers."""
    agent = agent_of(use(monkeypatch, Choice1d, horizon=3))
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    am.evaluate(agent, "probe", 8)
    assert torch.rand(()) == expected
