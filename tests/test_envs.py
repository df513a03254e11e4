"""envs.py: the interface for every name, then what each suite promises. About 15 seconds."""

import copy
import importlib.util
import json
import pickle
import random
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
from envs import DIFFICULTIES, POPGYM, list_envs, make_env

POPGYM_NAMES = [name for name, _ in list_envs() if name.startswith("popgym:")]
GYM_NAMES = ["gym:CartPole-v1", "gym:Pendulum-v1", "gym:MountainCarContinuous-v0",
             "gym:Blackjack-v1", "gym:FrozenLake-v1?is_slippery=true", "gym:CartPole-v1?horizon=7"]
META_NAMES = ["meta:popgym:MultiarmedBanditEasy?episodes=3", "meta:gym:CartPole-v1?episodes=2",
              "meta:popgym:CountRecallEasy?episodes=2"]
LABYRINTHS = [name for name in POPGYM_NAMES if "Labyrinth" in name]
needs_mazelib = pytest.mark.skipif(not LABYRINTHS, reason="mazelib is not installed")


def play(env, policy, seed=None):
    """One rollout; `policy` sees all observations so far. Returns (return, length)."""
    observation, _ = env.reset(seed=seed)
    seen, total, done = [observation], 0.0, False
    while not done:
        observation, reward, terminated, truncated, _ = env.step(policy(seen))
        seen.append(observation)
        total, done = total + reward, terminated or truncated
    return total, len(seen) - 1


def stream(env, steps, seed=None):
    """Observations, rewards and ends of a fixed random action sequence, resets included."""
    env.action_space.seed(1)
    out = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        out.append((observation, reward, terminated, truncated))
        if terminated or truncated:
            out.append(env.reset()[0])
    return out


def same(a, b):
    np.testing.assert_equal(a, b)


class Recorder(gymnasium.Env):
    """A raw environment that remembers its action, never ends and gives info away."""

    observation_space = spaces.Discrete(2)

    def __init__(self, action_space=spaces.Discrete(2), info=None):
        self.action_space, self.info = action_space, info or {}

    def reset(self, *, seed=None, options=None):
        return 0, self.info

    def step(self, action):
        self.action = action
        return 1, 0, False, False, self.info


# ---- the interface ----


def test_all_popgym_classes_are_listed():
    assert len(POPGYM_NAMES) == (48 if importlib.util.find_spec("mazelib") else 42)
    assert {"gym:CartPole-v1", META_NAMES[1], *POPGYM_NAMES} <= set(dict(list_envs()))
    assert all(explanation and "\n" not in explanation for _, explanation in list_envs())


@pytest.mark.parametrize("name", POPGYM_NAMES + GYM_NAMES + META_NAMES)
def test_check_env_and_interface(name):
    env = make_env(name, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a Box without finite bounds is the one thing allowed
        warnings.filterwarnings("ignore", ".*observation space m.*infinity")
        check_env(env, skip_render_check=True)
    box = env.observation_space
    assert isinstance(box, spaces.Box) and box.dtype == np.float32 and len(box.shape) == 1
    assert env.name == name == make_env(env.name).name
    assert isinstance(env.horizon, int) and set(env.references) <= {"random", "best", "paper"}
    assert all(isinstance(value, float) for value in env.references.values())
    observation, info = env.reset()
    assert info == {} and observation.dtype == np.float32
    for _ in range(5):
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert [type(x) for x in (reward, terminated, truncated)] == [float, bool, bool]
        if terminated or truncated:
            env.reset()


@pytest.mark.parametrize("name", POPGYM_NAMES + GYM_NAMES + META_NAMES)
def test_seeds(name):
    """reset(seed) decides everything, a second instance in between changes nothing."""
    first, second, third = make_env(name, seed=3), make_env(name), make_env(name, seed=4)
    expected = stream(first, 250)  # make_env's seed, plain reset
    second.reset(seed=9)
    second.action_space.seed(1)
    got = [second.reset(seed=3)[0]]
    for _ in range(250):
        third.reset()  # the other instance
        observation, reward, terminated, truncated, _ = second.step(second.action_space.sample())
        got.append((observation, reward, terminated, truncated))
        if terminated or truncated:
            got.append(second.reset()[0])
    same(got, expected)
    same(stream(first, 250, seed=3), expected)
    with pytest.raises(AssertionError):
        same(stream(third, 250, seed=4), expected)


@pytest.mark.parametrize("name", ["popgym:CountRecallEasy", "popgym:AutoencodeEasy",
                                  "popgym:BattleshipEasy", "gym:Pendulum-v1", META_NAMES[0]])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_continue_exactly(name, clone):
    env = make_env(name, seed=0)
    stream(env, 20)
    twin = clone(env)
    same(stream(env, 300), stream(twin, 300))


def test_seeds_that_old_generators_cannot_take(monkeypatch):
    """Catches --seed 2147 and more, whose environments' seeds have more than 32 bits."""
    seeds = []
    monkeypatch.setattr(Recorder, "reset", lambda self, *, seed, options: (
        seeds.append(np.random.RandomState(seed).randint(9)), (0, {}))[1])
    env = envs.Adapter(Recorder(), "test", 10)
    for seed in (3, 2**32 + 3):
        env.reset(seed=seed)
    assert len(seeds) == 2 and seeds[0] == seeds[1]


def test_seed_also_seeds_np_random():
    one, two = (make_env("popgym:RepeatFirst", seed=5).np_random.random() for _ in range(2))
    assert one == two


# ---- spaces ----

SPACES = [
    spaces.Discrete(5), spaces.Discrete(4, start=-2), spaces.MultiDiscrete([3, 2, 4]),
    spaces.MultiDiscrete([[3, 2], [4, 5]], start=[[1, 0], [-1, 2]]), spaces.MultiBinary(3),
    spaces.Box(-1e300, 1e300, (2, 3), np.float64), spaces.Box(0, 255, (6,), np.uint8),
    spaces.Box(-1, 1, (), np.float32),
    spaces.Tuple((spaces.Discrete(3, start=1), spaces.Box(-1, 1, (2,)))),
    spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Tuple((spaces.Discrete(3),
                 spaces.Dict({"z": spaces.MultiDiscrete([2, 2]), "y": spaces.Box(0, 1, (1,))})))}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_encoding_equals_gymnasium_flatten(space):
    check_flatten(space, *envs.observation_encoder(space))


@pytest.mark.parametrize("name", POPGYM_NAMES)
def test_popgym_encoding_equals_gymnasium_flatten(name):
    env = make_env(name)
    check_flatten(env.inner.observation_space, env.observation_space, env._encode)


def check_flatten(space, uniform, encode):
    space.seed(0)
    for _ in range(20):
        raw = space.sample()
        if isinstance(space, spaces.Box) and space.dtype == np.float64:
            raw *= 1e-295  # larger ones are refused, see LARGEST
        expected = spaces.utils.flatten(space, raw).astype(np.float32)
        got = encode(raw)
        assert got.dtype == np.float32 and got in uniform
        same(got, expected)
        got += 1  # the caller owns it: neither tables nor the raw observation may change
        same(encode(raw), expected)


def test_pictures():
    image = spaces.Box(0, 255, (4, 5, 3), np.uint8)
    uniform, encode = envs.observation_encoder(image)
    picture = image.sample()
    assert uniform == image and encode(picture) is not picture
    same(encode(picture), picture)

    both = spaces.Dict({"camera": image, "pose": spaces.Dict({"x": spaces.Box(-1, 1, (2,)),
                                                              "mode": spaces.Discrete(3)})})
    uniform, encode = envs.observation_encoder(both)
    raw = both.sample()
    got = encode(raw)
    assert got in uniform and set(got) == {"image", "vector"}
    same(got["image"], raw["camera"])
    same(got["vector"], spaces.utils.flatten(both["pose"], raw["pose"]).astype(np.float32))

    only = spaces.Tuple((image,))
    uniform, encode = envs.observation_encoder(only)
    assert set(uniform) == {"image"} and encode((picture,)) in uniform
    with pytest.raises(ValueError, match="2 pictures"):
        envs.observation_encoder(spaces.Tuple((image, image)))
    with pytest.raises(ValueError, match="Text.*not supported"):
        envs.observation_encoder(spaces.Dict({"mission": spaces.Text(5)}))


def test_continuous_actions_are_rescaled_to_the_inner_bounds():
    low, high = np.float32([-3.0, 0.1]), np.float32([5.0, 0.7])
    raw = Recorder(spaces.Box(low, high))
    env = envs.Adapter(raw, "test", 10)
    assert env.action_space == spaces.Box(-1, 1, (2,), np.float32)
    for action, expected in [([-1, -1], low), ([1, 1], high), ([0, 0.5], [1.0, 0.55])]:
        env.step(np.float32(action))
        assert raw.action.dtype == np.float32
        np.testing.assert_allclose(raw.action, expected, rtol=0 if abs(action[0]) >= 1 else 1e-6)


@pytest.mark.parametrize("space, action", [
    (spaces.Box(-3, 5, (2,)), np.float32([-9, 0])), (spaces.Box(-3, 5, (2,)), [0, np.inf]),
    (spaces.Box(-3, 5, (2,)), [0, np.nan]), (spaces.Box(-3, 5, (2,)), [0]),
    (spaces.Discrete(3), 3), (spaces.Discrete(3), 1.0), (spaces.Discrete(3), np.float32(1)),
    (spaces.Discrete(3), -1), (spaces.Discrete(3), "1"),
    (spaces.MultiDiscrete([2, 3]), 6), (spaces.MultiDiscrete([2, 3]), 1.5)], ids=repr)
def test_actions_outside_their_space_change_nothing(space, action):
    """Catches an action that is bent into the space: rounded, cut off, counted from the end."""
    raw = Recorder(space)
    env = envs.Adapter(raw, "test", 10)
    raw.action = None
    with pytest.raises(ValueError):
        env.step(action)
    assert raw.action is None


@pytest.mark.parametrize("space", [spaces.Box(-np.inf, 1, (2,)), spaces.Box(-1, 1, (2, 2)),
                                   spaces.Box(0, 9, (2,), np.int64), spaces.MultiBinary(2)],
                         ids=str)
def test_other_actions_are_refused(space):
    with pytest.raises(ValueError, match="1-D float Box with finite bounds"):
        envs.Adapter(Recorder(space), "test", 10)


def test_integer_actions_count_from_zero_and_arrive_plain():
    raw = Recorder(spaces.Discrete(3, start=-1))
    env = envs.Adapter(raw, "test", 10)
    assert env.action_space == spaces.Discrete(3)
    for action in (2, np.int64(2), np.array(2), np.array([2])):
        env.step(action)
        assert raw.action == 1 and type(raw.action) is int
    raw = Recorder(spaces.MultiDiscrete([[2, 3]], start=[[0, 5]]))
    env = envs.Adapter(raw, "test", 10)
    assert env.action_space == spaces.MultiDiscrete([2, 3])
    env.step([1, 2])
    same(raw.action, [[1, 7]])


@pytest.mark.parametrize("space, wrongs", [
    (spaces.Discrete(3), (-1, 3, 1.5, "1", None, [1])),      # -1 must not mean the last one
    (spaces.MultiDiscrete([2, 3]), ([1, 3], [-1, 0], [1], 1, "1", None)),
    (spaces.Box(-2, 2, (2,)), ([0, np.nan], [0], 0, "up", None))], ids=str)
def test_an_action_outside_the_space_changes_nothing(space, wrongs):
    """Catches an action that is bent until it fits, and a traceback from inside."""
    raw = Recorder(space)
    env = envs.Adapter(raw, "test", 10)
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"^test: action .* is not in (Multi)?(Discrete|Box)"):
            env.step(wrong)
    assert env.time == 0 and not hasattr(raw, "action")


@pytest.mark.parametrize("space, count", [
    (spaces.MultiDiscrete([1000] * 6), "1,000,000,000,000,000,000"),
    (spaces.MultiDiscrete([101, 100]), "10,100"), (spaces.Discrete(10_001), "10,001")], ids=str)
def test_too_many_actions_are_refused(space, count):
    """Catches a network with an output for each of 10^18 combinations."""
    with pytest.raises(envs.UsageError, match=f"gym:Mine-v0 has {count} actions.*at most 10,000$"):
        envs.Spec.of(envs.Adapter(Recorder(space), "gym:Mine-v0", 10))
    for few in (spaces.MultiDiscrete([100, 100]), spaces.Discrete(10_000)):
        assert envs.Spec.of(envs.Adapter(Recorder(few), "gym:Mine-v0", 10)).actions == 10_000


@pytest.mark.parametrize("name", [n for n in POPGYM_NAMES if n.endswith("Easy")])
def test_popgym_takes_every_kind_of_integer(name):
    env = make_env(name, seed=0)
    sample = env.action_space.sample()
    kinds = [sample, np.asarray(sample), list(np.ravel(sample))]
    if isinstance(env.action_space, spaces.Discrete):
        kinds = [int(sample), np.int64(sample), np.array(sample), np.array([sample])]
    for action in kinds:
        env.reset()
        env.step(action)


# ---- environments that break their own promise ----

PAIR = spaces.Dict({"a": spaces.Discrete(5), "b": spaces.Box(-1, 1, (2,))})
IMAGE = spaces.Box(0, 255, (4, 4, 3), np.uint8)
BROKEN = [  # space, observation, what the message has to name besides environment and step
    (spaces.Discrete(5), -1, "observation is -1, not in Discrete(5)"),
    (spaces.Discrete(5), 7, "observation is 7, not in Discrete(5)"),
    (spaces.Discrete(5), 1.5, "observation is 1.5, not"),
    (spaces.Discrete(3, start=2), 1, "observation is 1, not in Discrete(3, start=2)"),
    (spaces.Discrete(5), None, "observation is None"),
    (spaces.MultiDiscrete([3, 2]), [0, -1], "observation is [0, -1], not in MultiDiscrete([3 2])"),
    (spaces.MultiDiscrete([3, 2]), np.array([3, 0]), "array([3, 0]) of shape (2,), not in"),
    (spaces.MultiDiscrete([3, 2]), [0, 1, 1], "[0, 1, 1]"),
    (spaces.MultiBinary(2), np.array([0, 2]), "array([0, 2])"),
    (spaces.Box(-1, 1, (2, 3)), np.zeros((3, 2)), "shape (3, 2), not float32 of shape (2, 3)"),
    (spaces.Box(-1, 1, (1,)), 0.5, "is 0.5, not float32 of shape (1,)"),
    (spaces.Box(-1, 1, (2,)), "text", "'text'"),
    (spaces.Box(-np.inf, np.inf, (1,)), np.array([1e38]), "array([1.e+38])"),
    (spaces.Box(-np.inf, np.inf, (1,)), np.array([-1e300]), "array([-1.e+300])"),
    (spaces.Box(-np.inf, np.inf, (99,)), np.full(99, np.nan), "array([nan, nan"),
    (PAIR, {"a": 1}, "observation['b'] is missing"), (PAIR, None, "observation['a'] is missing"),
    (PAIR, {"a": 5, "b": np.zeros(2)}, "observation['a'] is 5"),
    (PAIR, {"a": 1, "b": np.array([0, np.nan])}, "observation['b'] is array([ 0., nan])"),
    (spaces.Tuple((PAIR, IMAGE)), ({"a": 1, "b": np.zeros(2)}, np.zeros((4, 4, 3))),
     "observation[1] is"),
    (IMAGE, np.zeros((4, 5, 3), np.uint8), "shape (4, 5, 3), not uint8 of shape (4, 4, 3)"),
]


@pytest.mark.parametrize("space, wrong, message", BROKEN, ids=[case[2] for case in BROKEN])
def test_observations_outside_their_space_are_named(space, wrong, message, monkeypatch):
    """Catches a wrong observation that is encoded as something else, or ends in a traceback."""
    good = space.sample()
    monkeypatch.setattr(Recorder, "observation_space", space)
    monkeypatch.setattr(Recorder, "reset", lambda self, **how: (self.seen, {}))
    monkeypatch.setattr(Recorder, "step", lambda self, action: (self.seen, 0, False, False, {}))
    for begin in (good, wrong):
        env = envs.Adapter(Recorder(), "gym:Mine-v0", 10)
        env.inner.seen = begin
        with pytest.raises(envs.BrokenEnvironment) as error, warnings.catch_warnings():
            warnings.simplefilter("error")
            env.reset()
            env.step(0)
            env.inner.seen = wrong
            env.step(0)
        text = str(error.value)
        assert text.startswith(f"gym:Mine-v0: at step {2 if begin is good else 0}, ")
        assert message in text and len(text.splitlines()) == 1 and len(text) < 200


@pytest.mark.parametrize("reward", [None, "much", [1, 2]])
def test_rewards_that_are_no_numbers_are_named(reward, monkeypatch):
    monkeypatch.setattr(Recorder, "step", lambda self, action: (1, reward, False, False, {}))
    env = envs.Adapter(Recorder(), "gym:Mine-v0", 10)
    env.reset()
    with pytest.raises(envs.BrokenEnvironment, match="gym:Mine-v0: at step 1, the reward is ") as e:
        env.step(0)
    assert repr(reward) in str(e.value)


@pytest.mark.parametrize("result", [(1, 0.0, False, {}), (1, 0.0, False, False, None), None])
def test_a_step_of_another_api_is_named(result, monkeypatch):
    """Catches a traceback for gym's old step of four things, which says nothing of whose it is."""
    monkeypatch.setattr(Recorder, "step", lambda self, action: result)
    env = envs.Adapter(Recorder(), "gym:Mine-v0", 10)
    env.reset()
    with pytest.raises(envs.BrokenEnvironment, match="gym:Mine-v0: at step 1, what step returns"):
        env.step(0)


def test_success_unknown_is_no_success(monkeypatch):
    monkeypatch.setattr(Recorder, "step", lambda *_: (1, 0.0, False, False, {"is_success": None}))
    env = envs.Adapter(Recorder(), "gym:Mine-v0", 10)
    env.reset()
    assert env.step(0)[4] == {}


def test_numbers_a_little_outside_are_accepted():
    """popgym's and gymnasium's own environments leave their bounds by rounding, or by noise."""
    encode = envs.observation_encoder(spaces.Box(-1, 1, (2,)))[1]
    same(encode([1.5, -1e9]), np.float32([1.5, -1e9]))


# ---- what the agent must not see, and how rollouts end ----


@pytest.mark.parametrize("name", POPGYM_NAMES)
def test_popgym_info_leaks_nothing(name):
    env = make_env(name, seed=0)
    infos = [env.reset()[1], *(env.step(env.action_space.sample())[4] for _ in range(1))]
    assert infos == [{}, {}] and infos[0] is not infos[1]


@pytest.mark.parametrize("given_info, expected", [
    ({"success": True, "answer": 3}, {"success": 1.0}), ({"is_success": 1}, {"success": 1.0}),
    ({"reset": True, "success": 0}, {"reset": True, "success": 0.0}),
    ({"reset": np.bool_(True)}, {"reset": True}), ({"reset": False}, {}),
    ({"reset": np.arange(3)}, {})], ids=str)                 # another package's, of another meaning
def test_info_hands_on_success_and_where_an_inner_episode_begins(given_info, expected):
    """Catches what the agent must not see, and a `reset` that README promises and nobody gets."""
    env = envs.Adapter(Recorder(info=given_info), "test", 10)
    for info in (env.reset()[1], env.step(0)[4]):
        assert info == expected and info is not given_info


def test_numpy_scalars_become_plain(monkeypatch):
    monkeypatch.setattr(Recorder, "step", lambda self, action: (
        1, np.float32(0.5), np.bool_(True), np.bool_(True), {}))
    end = envs.Adapter(Recorder(), "test", 10).step(0)[1:4]
    assert end == (0.5, True, True) and [type(x) for x in end] == [float, bool, bool]


def test_gym_time_limit():
    env = make_env("gym:MountainCar-v0", horizon=5)
    assert (env.name, env.horizon) == ("gym:MountainCar-v0?horizon=5", 5)
    for _ in range(2):  # the second reset starts a new count
        env.reset(seed=0)
        ends = [env.step(1)[2:4] for _ in range(5)]
        assert ends == [(False, False)] * 4 + [(False, True)]
    assert make_env("gym:MountainCar-v0").horizon == 200
    assert make_env("gym:MountainCar-v0", horizon=300).horizon == 300
    assert play(make_env("gym:MountainCar-v0?horizon=300"), lambda seen: 1, seed=0)[1] == 300
    assert make_env("gym:Blackjack-v1").horizon == 1000  # registered without a limit
    assert make_env("gym:CartPole-v1").max_return is None


def test_terminated_and_truncated_stay_apart():
    for name, expected in [("popgym:RepeatPrevious", (True, False)),  # ends with the last card
                           ("popgym:MultiarmedBandit", (False, True)),  # ends by the clock
                           ("gym:Blackjack-v1", (True, False))]:
        env = make_env(name, seed=0)
        env.reset()
        ends = (False, False)
        while not any(ends):
            ends = env.step(0)[2:4]
        assert ends == expected, name


# ---- popgym ----


def suit(observation):
    return int(np.argmax(observation[-4:]))


def repeat_previous(lag):
    return lambda seen: suit(seen[-1 - lag]) if len(seen) > lag else 0


def repeat_first(seen):
    return suit(seen[0])


def autoencode(seen):
    """Watched cards have flag [0, 1]; the last one already carries the flag of playing back."""
    watched = 1 + sum(int(observation[1]) for observation in seen)
    back = len(seen) - watched
    return suit(seen[watched - 1 - back]) if back >= 0 else 0


def count_recall(seen):
    values = np.split(np.array(seen), 2, axis=1)[0].argmax(1)
    return int((values == np.argmax(seen[-1][len(seen[-1]) // 2:])).sum())


def balance(position, velocity):
    return int(position @ [0.02, 1.0] + velocity @ [0.06, 0.3] > 0)


def position_cartpole(seen):
    velocity = (seen[-1] - seen[-2]) / 0.02 if len(seen) > 1 else np.zeros(2)
    return balance(seen[-1], velocity)


def velocity_cartpole(seen):
    """popgym's first observation here is the position (a bug of its own): integrate from it."""
    velocities = np.array(seen[1:]).reshape(-1, 2)
    before = np.vstack([np.zeros((1, 2)), velocities])  # Euler steps use the velocity before
    return balance(seen[0] + 0.02 * before[:-1].sum(0), before[-1])


ORACLES = {"RepeatFirst": (repeat_first,) * 3, "Autoencode": (autoencode,) * 3,
           "CountRecall": (count_recall,) * 3, "PositionOnlyCartPole": (position_cartpole,) * 3,
           "VelocityOnlyCartPole": (velocity_cartpole,) * 3,
           "RepeatPrevious": tuple(repeat_previous(k - 1) for k in (4, 32, 64))}


@pytest.mark.parametrize("family", ORACLES)
@pytest.mark.parametrize("level", range(3), ids=DIFFICULTIES)
def test_playing_from_observations_alone_reaches_the_maximum(family, level):
    env = make_env(f"popgym:{family}{DIFFICULTIES[level]}")
    for seed in range(2):
        total, length = play(env, ORACLES[family][level], seed)
        assert total == pytest.approx(1.0, abs=1e-9)
        assert length == env.horizon
    assert env.references["best"] == 1.0
    assert env.max_return == 1.0


@pytest.mark.parametrize("difficulty, k", [*zip(DIFFICULTIES, (4, 32, 64))])
def test_repeat_previous_asks_for_the_card_k_minus_1_back(difficulty, k):
    """popgym's docstring calls k=1 "the previous card", a few lines on k=16 "15 timesteps ago".

    The code does the latter: Easy has k=4 and rewards the card 3 before the current one. Reading
    4 back looks just as plausible and earns what guessing earns, -0.5.
    """
    env = make_env(f"popgym:RepeatPrevious{difficulty}")
    off_by_one = np.mean([play(env, repeat_previous(k), seed)[0] for seed in range(5)])
    assert off_by_one == pytest.approx(-0.5, abs=0.2)


@pytest.mark.parametrize("name", POPGYM_NAMES)
def test_random_returns_and_horizon(name):
    env = make_env(name)
    env.action_space.seed(0)
    episodes = 6 if "Explore" in name else 25
    results = [play(env, lambda seen: env.action_space.sample(), seed) for seed in range(episodes)]
    returns, lengths = np.array(results).T
    # a random walk may miss the exit in all episodes here, which says nothing about the spread
    spread = max(returns.std(ddof=1), 0.3 if "Escape" in name else 0.0)
    # four standard errors of this sample and of the table's, which had at least as many episodes
    tolerance = 4 * spread * np.sqrt(2 / episodes) + 0.001
    assert returns.mean() == pytest.approx(env.references["random"], abs=tolerance)
    assert max(lengths) <= env.horizon
    ends_early = any(part in name for part in ("CartPole", "MineSweeper", "Labyrinth"))
    assert ends_early or max(lengths) == env.horizon
    # a Labyrinth counts its first observation as a step
    limit = getattr(env.inner, "max_episode_length", env.horizon) - (name in LABYRINTHS)
    assert env.horizon == limit


def test_paper_column_is_the_papers():
    paper = [value for row in POPGYM.values() for value in row[3] if value is not None]
    assert len(paper) == 39 and np.mean(paper) == pytest.approx(0.6245, abs=1e-4)
    assert make_env("popgym:PositionOnlyCartPoleEasy").references["paper"] == 0.998
    assert make_env("popgym:NoisyPositionOnlyCartPoleHard").references["paper"] == 0.360
    assert "paper" not in make_env("popgym:VelocityOnlyCartPoleEasy").references


def test_no_difficulty_means_easy():
    assert make_env("popgym:RepeatPrevious").name == "popgym:RepeatPreviousEasy"


@needs_mazelib
def test_labyrinth_leaves_the_global_generators_alone():
    random.seed(0)
    np.random.seed(0)
    before = pickle.dumps((random.getstate(), np.random.get_state()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # popgym's advice against its mazes is silenced
        env = make_env("popgym:LabyrinthExploreEasy", seed=0)
    maze = env.reset()[0]
    grid = env.inner.maze.grid.copy()
    for _ in range(50):
        env.step(env.action_space.sample())
    env.reset()
    assert pickle.dumps((random.getstate(), np.random.get_state())) == before
    assert not np.array_equal(grid, env.inner.maze.grid), "every reset draws a new maze"
    random.seed(1)
    np.random.seed(1)
    same(make_env("popgym:LabyrinthExploreEasy", seed=0).reset()[0], maze)
    env.reset(seed=2**32 + 3)                   # --seed 2148 needs such seeds, numpy's are smaller


# ---- meta ----


def test_meta_repeats_one_task():
    env = make_env("meta:popgym:RepeatFirstEasy?episodes=3", seed=0)
    episode = env.horizon // 3
    tasks = []
    for _ in range(2):
        observation = env.reset()[0]
        seen, infos, ends = [observation], [], []
        for _ in range(env.horizon):
            observation, _, terminated, truncated, info = env.step(0)
            seen.append(observation)
            infos.append(info)
            ends.append((terminated, truncated))
        # the terminal observation is shown only at the very end: 3 x 51 observations + 1
        decks = np.array(seen[:-1]).reshape(3, episode, 4)
        same(decks[1], decks[0])
        same(decks[2], decks[0])
        resets = [t for t, info in enumerate(infos, 1) if "reset" in info]
        assert resets == [episode, 2 * episode] and infos[episode - 1]["reset"] is True
        assert ends == [(False, False)] * (env.horizon - 1) + [(True, False)]
        tasks.append(decks[0])
    assert not np.array_equal(*tasks), "a new rollout is a new task"


def test_meta_repeats_the_instruction_that_was_asked_for():
    """Catches inner episodes after the first that ask for something else."""
    env = make_env("meta:maze:7x7?goals=2", seed=0)
    observation = env.reset(seed=0, options={"instruction": "go to (1, 1), go to (5, 5)"})[0]
    asked, reset, generator = observation["instruction"][:, 1:], False, np.random.default_rng(0)
    while not reset:
        observation, *_, info = env.step(int(generator.integers(4)))
        reset = info.get("reset", False)
    same(observation["instruction"][:, 1:], asked)


def test_meta_bandit_keeps_its_arms():
    env = make_env("meta:popgym:MultiarmedBanditEasy?episodes=2", seed=0)
    env.reset()
    arms = env.inner.inner.bandits.copy()
    for _ in range(200):
        info = env.step(0)[4]
    assert info["reset"]
    same(env.inner.inner.bandits, arms)


def test_meta_returns():
    env = make_env("meta:gym:CartPole-v1?episodes=3", seed=0)
    assert env.horizon == 1500 and env.max_return is None and env.references == {}
    env.action_space.seed(0)
    env.reset()
    rewards, marks, done = [], [], False
    while not done:
        _, reward, terminated, truncated, info = env.step(env.action_space.sample())
        rewards.append(reward)
        done = terminated or truncated
        if "episode_return" in info:
            marks.append((len(rewards), info["episode_return"]))
    assert len(marks) == 3 and marks[-1][0] == len(rewards)
    starts = [0, *(step for step, _ in marks)]
    assert [value for _, value in marks] == [sum(rewards[a:b]) for a, b in zip(starts, starts[1:])]


def test_meta_references_and_names():
    env = make_env("meta:popgym:RepeatPreviousEasy", episodes=4)
    assert env.name == "meta:popgym:RepeatPreviousEasy?episodes=4" and env.horizon == 4 * 51
    assert env.max_return == 4.0
    assert env.references == {"random": pytest.approx(4 * -0.503), "best": 4.0}
    assert make_env("meta:popgym:HigherLower").references == {"random": 0.0}
    env = make_env("meta:CartPole-v1?episodes=3&horizon=20")  # a bare id is gymnasium's
    assert env.name == "meta:gym:CartPole-v1?episodes=3&horizon=20" == make_env(env.name).name
    assert env.horizon == 60


# ---- mistakes ----


@pytest.mark.parametrize("name, fragments", [
    ("popgym:RepatPrevious", ["'popgym:RepatPrevious'; nearest: popgym:RepeatPrevious, "
                              "popgym:RepeatFirst"]),
    ("popgym:RepatPreviousHard", ["nearest: popgym:RepeatPreviousHard"]),
    ("popgym:RepeatPreviousHrd", ["nearest: popgym:RepeatPreviousHard"]),
    ("popgym:repeatprevious", ["nearest: popgym:RepeatPrevious"]),
    ("popgym:REPEATFIRST", ["nearest: popgym:RepeatFirst"]),
    ("popgm:RepeatPrevious", ["unknown suite 'popgm'", "nearest: popgym"]),
    ("RepeatPreviousHard", ["no 'suite:'", "nearest: popgym:RepeatPreviousHard"]),
    ("CartPole-v1", ["no 'suite:'", "nearest: gym:CartPole-v1"]),
    ("gym:CartPole-v2", ["'gym:CartPole-v2'; nearest: gym:CartPole-v1"]),
    ("gym:CartPole-v1?horizn=3", ["unknown option 'horizn'", "nearest: horizon"]),
    ("gym:CartPole-v1?max_episode_steps=5", ["unknown option 'max_episode_steps'", "horizon"]),
    ("gym:CartPole-v1?horizon=0", ["'horizon'", "whole number >= 1, not 0"]),
    ("gym:CartPole-v1?horizon=true", ["whole number >= 1, not True"]),
    ("gym:FrozenLake-v1?map_name=9x9", ["cannot be built", "9x9"]),
    ("gym:CartPole-v1?render_mode=rgb", ["must be one of human, rgb_array; nearest: rgb_array"]),
    ("meta:gym:CartPole-v1?render_mode=7", ["'render_mode'", "one of human, rgb_array"]),
    ("popgym:RepeatFirst?k=3", ["unknown option 'k'", "takes none"]),
    ("popgym:RepeatFirst?seed=3", ["bad option 'seed=3'"]),
    ("gym:CartPole-v1?horizon=3&horizon=4", ["bad option 'horizon=4'"]),
    ("gym:CartPole-v1?horizon", ["bad option 'horizon'", "?key=value"]),
    ("meta:gym:CartPole-v1?episodes=0", ["'episodes'", "not 0"]),
    ("meta:gym:CartPole-v1?episodes=" + 400 * "9", ["'episodes'", "at most 1000000000000", "..."]),
    ("meta:meta:x\ny", ["meta inside meta"]),
    ("meta:popgm:RepeatFirst", ["unknown suite 'popgm'"]),
    ("meta:meta:gym:CartPole-v1", ["meta inside meta; nearest: meta:gym:CartPole-v1"]),
    ("", ["no 'suite:'"]), (":", ["unknown suite ''"]), ("popgym:", ["nearest: popgym:"]),
    ("gym:", ["nearest: gym:"]), ("meta:", ["nearest: gym:"]), (None, ["not None"]),
])
def test_mistakes_name_the_nearest_right_choice(name, fragments):
    with pytest.raises(ValueError) as error:
        make_env(name)
    message = str(error.value)
    assert "\n" not in message and all(fragment in message for fragment in fragments), message


def test_options_written_and_given():
    assert envs.parse_name("gym:X-v1?a=False&b=TRUE&c=1e3") == (
        "gym", "X-v1", {"a": False, "b": True, "c": 1000.0})
    assert make_env("gym:CartPole-v1?horizon=1e3").horizon == 1000
    assert envs.parse_name("gym:X-v1?a=3&b=0.5&c=true&d=4x4&e=false") == (
        "gym", "X-v1", {"a": 3, "b": 0.5, "c": True, "d": "4x4", "e": False})
    env = make_env("gym:FrozenLake-v1?is_slippery=true&horizon=9", is_slippery=False)
    assert env.name == "gym:FrozenLake-v1?horizon=9&is_slippery=false"
    assert play(env, lambda seen: [1, 1, 2, 1, 2, 2][len(seen) - 1], seed=0) == (1.0, 6)


@pytest.mark.parametrize("absent, name, command", [
    ("mazelib", "popgym:LabyrinthEscapeHard", "pip install mazelib==0.9.16"),
    ("popgym", "popgym:RepeatFirst", "pip install popgym==1.0.7"),
    ("some_package", "gym:some_package:Env-v0", "no some_package.py .*, nor such a package"),
    ("no_package", "gym:no_package:F\nB", "F.nB' needs .* nor such a package")])  # on one line
def test_absent_packages_name_their_command(monkeypatch, absent, name, command):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda module: None if module == absent else find(module))
    with pytest.raises(ModuleNotFoundError, match=command + "$"):
        make_env(name)
    assert not any(absent == "mazelib" and "Labyrinth" in listed for listed, _ in list_envs())


@pytest.mark.parametrize("error, command", [
    (gymnasium.error.DependencyNotInstalled('no Box2D, run `pip install "gymnasium[box2d]"`'),
     'pip install "gymnasium[box2d]"'),
    (ModuleNotFoundError("No module named 'jax'", name="jax"), 'pip install "gymnasium[jax]"'),
    (ModuleNotFoundError("No module named 'thing'", name="thing"), "pip install thing"),
    (ImportError("have moved to gymnasium-robotics (...)"), "pip install gymnasium-robotics")])
def test_absent_gym_packages_name_their_command(monkeypatch, error, command):
    def make(*args, **kwargs):
        raise error
    monkeypatch.setattr(gymnasium, "make", make)
    with pytest.raises(ModuleNotFoundError) as raised:
        make_env("gym:CartPole-v1")
    assert str(raised.value).endswith(command) and "\n" not in str(raised.value)


def test_a_bug_of_a_constructor_is_shown_as_it_is(monkeypatch):
    """Catches advice to install a package that is there, and a ValueError, which would become one
    line about bad arguments that names nobody."""
    def make(*args, **kwargs):
        raise error
    monkeypatch.setattr(gymnasium, "make", make)
    for error, kind in ((ImportError("cannot import name 'x' from 'numpy'"), ImportError),
                        (ValueError("setting an array element"), RuntimeError)):
        with pytest.raises(kind) as raised:
            make_env("gym:CartPole-v1")
        assert type(raised.value) is kind
        assert raised.value is error or "gym:CartPole-v1" in str(raised.value)


@pytest.mark.parametrize("mode", ["human", "rgb_array"])
@pytest.mark.parametrize("wrapped", ["", "meta:"])
def test_pictures_without_pygame_name_their_command(wrapped, mode, monkeypatch, capsys):
    """Catches a traceback at the first picture, which CartPole only tries to draw then."""
    monkeypatch.setitem(sys.modules, "pygame", None)
    name = f"{wrapped}gym:CartPole-v1?render_mode={mode}"
    env = make_env(name)
    with pytest.raises(ModuleNotFoundError, match='pip install "gymnasium.classic-control."$'):
        env.reset(seed=0)
        env.render()
    assert envs.main([name, "--play"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "pip install" in err


@pytest.mark.skipif(importlib.util.find_spec("pygame") is not None, reason="pygame is installed")
def test_an_absent_package_is_named_by_a_worker_too():
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        envs.ParallelEnvs("gym:CartPole-v1?render_mode=human", np.arange(1), 1).call("begin_all")


WORDS = st.sampled_from(["popgym", "gym", "meta", ":", "?", "=", "&", "episodes", "horizon", "",
                         "CartPole-v1", "RepeatFirst", "Easy", "2", "-1", "true", "\n", "é"])


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.text(max_size=20) | st.lists(WORDS, max_size=9).map("".join))
def test_any_string_builds_or_explains(name):
    try:
        env = make_env(name)
    except (ValueError, ModuleNotFoundError) as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) > 20
    else:
        assert env.observation_space.contains(env.reset(seed=0)[0])


# ---- the command line ----


def test_table_and_card(capsys):
    assert envs.main([]) == 0
    table, foot = capsys.readouterr().out.split("\n\n")
    table = table.splitlines()
    assert len(table) == 1 + len(list(list_envs())) and len({len(line) for line in table}) == 1
    assert set(table[0].split()[3:]) <= {word.strip(",:;") for word in foot.split()}
    row = next(line for line in table if line.startswith("popgym:RepeatPreviousEasy")).split()
    assert row[1:-1] == "vector 4 one of 4 51 -0.503 1.000 0.997 memory".split()
    assert int(row[-1].replace(",", "")) > 1000
    assert envs.main(["popgym:RepeatPrevious"]) == 0
    assert "popgym:RepeatPreviousEasy" in capsys.readouterr().out
    assert envs.main(["popgym:RepatPrevious"]) == 2
    assert "nearest: popgym:RepeatPrevious" in capsys.readouterr().err


@pytest.mark.parametrize("name, needs", [
    ("popgym:RepeatFirst", "memory"), ("gym:CartPole-v1", ""), ("meta:CartPole-v1", "adaptation"),
    ("meta:popgym:RepeatFirst", "memory, adaptation"), ("wind:", "adaptation"),
    ("maze:7x7", "memory, instructions"), ("meta:darkkey:5x5", "memory, adaptation"),
    ("maze:7x7?rewired=1", "memory, adaptation, instructions"), ("tmaze:9", "memory"),
    ("meta:maze:7x7", "memory, adaptation, instructions"), ("crafter:undirected", "memory"),
    ("delivery:30", "memory, adaptation, instructions"),
    ("crafter:instructions", "memory, instructions")])
def test_what_an_environment_needs(name, needs):
    shown = envs.describe(name)
    assert make_env(name).needs == needs and shown["needs"] == (needs or "-")
    assert ("instruction" in shown["observation"]) == ("instructions" in needs)


def test_a_table_cut_short(tmp_path):
    """Catches a traceback from `python envs.py | head`."""
    command = f"{sys.executable} {envs.__file__} 2> {tmp_path / 'error'} | head -1"
    shown = subprocess.run(command, shell=True, capture_output=True, text=True).stdout
    assert shown.startswith("name") and (tmp_path / "error").read_text() == ""


@pytest.mark.parametrize("name", ["popgym:RepeatPreviousEasy", "popgym:PositionOnlyCartPoleEasy",
                                  "gym:CartPole-v1", "meta:gym:CartPole-v1?episodes=2"])
def test_an_episode_can_be_begun_again(name):
    """What resume needs: env.episode and np_random's state, then everything goes on as it was."""
    first, second = make_env(name, seed=3), make_env(name, seed=99)
    first.reset()
    first.reset()
    state = first.np_random.bit_generator.state
    second.reset(options={"episode": json.loads(json.dumps(first.episode))})
    second.np_random.bit_generator.state = state
    for env in (first, second):
        env.action_space.seed(0)
    for _ in range(300):
        results = []
        for env in (first, second):
            observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            if terminated or truncated:
                observation, _ = env.reset()
            results.append((observation.tolist(), reward, terminated, truncated))
        assert results[0] == results[1]
