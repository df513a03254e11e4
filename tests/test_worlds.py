"""The worlds of envs.py that are written there: rules, oracles, instructions. About 15 seconds."""

import collections
import copy
import importlib
import importlib.util
import io
import itertools
import json
import pickle
import re
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
from envs import ACTIVE, DONE, EAST, NORTH, SOUTH, STAY, STEPS, WAITING, WEST, make_env

NAMES = ["darkkey:9x9", "darkkey:8x8?fixed_start=true", "darkkey:2x3", "tmaze:100", "tmaze:1",
         "wind:", "maze:5x5", "maze:7x7?goals=1", "maze:15x15", "maze:31x31?goals=5",
         "maze:9x13?position=false&rewired=true", "delivery:30", "delivery:11",
         "maze:7x7?instruction=travel to (1, 1), travel to (5, 3) x2",
         "delivery:12?instruction=deliver to 11, deliver to 3"]
INSTRUCTED = [name for name in NAMES if name.startswith(("maze", "delivery"))]
FUZZ = settings(max_examples=100, deadline=None, database=None, derandomize=True)


def play(env, make_policy, seed):
    """One rollout of make_policy(env)(observation, reward, info). -> (return, steps, last info)"""
    observation, info = env.reset(seed=seed)
    policy, reward, total, done = make_policy(env), 0.0, 0.0, False
    while not done:
        observation, reward, terminated, truncated, info = env.step(
            policy(observation, reward, info))
        total, done = total + reward, terminated or truncated
    return total, getattr(env, "time", None), info


def mean_return(name, policy, rollouts):
    """-> (mean, standard error)"""
    env = make_env(name)
    env.action_space.seed(0)
    returns = [play(env, policy, seed)[0] for seed in range(rollouts)]
    return np.mean(returns), np.std(returns) / np.sqrt(rollouts)


def uniform(env):
    return lambda observation, reward, info: env.action_space.sample()


def stream(env, steps, seed):
    """Everything that comes back for a fixed sequence of random actions, resets included."""
    env.action_space.seed(1)
    out = [env.reset(seed=seed)]
    for _ in range(steps):
        out.append(env.step(env.action_space.sample()))
        if out[-1][2] or out[-1][3]:
            out.append(env.reset())
    return out


def same(a, b):
    np.testing.assert_equal(a, b)


def state(env):
    """Everything that the environment is, for comparisons."""
    return pickle.dumps({key: value for key, value in vars(env).items() if key != "action_space"})


# ---- the interface ----


@pytest.mark.parametrize("name", NAMES)
def test_check_env_and_interface(name):
    env = make_env(name, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=True)
    assert env.name == name == make_env(env.name).name
    assert isinstance(env.horizon, int) and set(env.references) <= {"random", "best", "paper"}
    observation, info = env.reset()
    assert info == {}
    for _ in range(env.horizon):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert observation in env.observation_space
        assert [type(x) for x in (reward, terminated, truncated)] == [float, bool, bool]
        if terminated or truncated:
            break
    assert terminated != truncated  # at the horizon at last, and never both
    assert terminated or env.time == env.horizon


@pytest.mark.parametrize("name", NAMES)
def test_seeds_copies_and_episodes(name):
    first, second = make_env(name), make_env(name, seed=9)
    expected = stream(first, 150, seed=3)
    same(stream(second, 150, seed=3), expected)
    with pytest.raises(AssertionError):
        same([stream(second, 150, seed=seed) for seed in range(4, 9)], [expected] * 5)
    action = first.action_space.sample()
    copies = copy.deepcopy(first), pickle.loads(pickle.dumps(first))
    result = first.step(action)
    same([clone.step(action) for clone in copies], [result] * 2)
    # what resume needs: the episode and np_random's state
    for _ in range(2):
        first.reset()
    second.reset(options={"episode": json.loads(json.dumps(first.episode))})
    second.np_random.bit_generator.state = first.np_random.bit_generator.state
    for env in (first, second):
        env.action_space.seed(0)
    for _ in range(150):
        results = [env.step(env.action_space.sample()) for env in (first, second)]
        same(*results)
        if results[0][2] or results[0][3]:
            same(first.reset(), second.reset())


def test_first_plain_reset_is_the_seeds():
    env = make_env("maze:15x15", seed=5)
    observation = env.reset()[0]
    same(observation, make_env("maze:15x15").reset(seed=5)[0])
    assert env.episode == 5


@pytest.mark.parametrize("name", NAMES)
def test_observations_belong_to_the_caller(name):
    """A learner may change what it was given: not the next observation, nor a table."""
    env, twin = make_env(name), make_env(name)
    spoiled, kept = env.reset(seed=1)[0], twin.reset(seed=1)[0]
    for _ in range(20):
        for part in spoiled.values() if isinstance(spoiled, dict) else [spoiled]:
            part += 1
        action = STAY if isinstance(env.action_space, spaces.Discrete) else np.zeros(2, np.float32)
        action = min(action, env.action_space.n - 1) if np.isscalar(action) else action
        result, expected = env.step(action), twin.step(action)
        same(result, expected)
        spoiled, kept = result[0], expected[0]
        if expected[2] or expected[3]:
            spoiled, kept = env.reset(seed=1)[0], twin.reset(seed=1)[0]
            same(spoiled, kept)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_actions_change_nothing(name):
    env = make_env(name, seed=0)
    env.reset()
    before = state(env)
    wrong = [np.float32([0.0, 1.1]), np.float32([0, 0, 0]), np.float32([np.nan, 0])]
    if isinstance(env.action_space, spaces.Discrete):
        wrong = [-1, int(env.action_space.n), 1.0, None, "0", np.array([0])]
    for action in wrong:
        with pytest.raises(ValueError, match=re.escape(env.name)):
            env.step(action)
    assert state(env) == before


@pytest.mark.parametrize("name", ["tmaze:1", "maze:7x7"])
def test_no_step_without_an_episode(name):
    env = make_env(name)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    for _ in range(env.horizon):
        *_, terminated, truncated, _ = env.step(STAY if name == "maze:7x7" else 0)
    assert terminated or truncated
    before = state(env)
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        env.step(0)
    assert state(env) == before
    env.reset()
    env.step(0)


def test_unknown_reset_options_are_refused():
    with pytest.raises(ValueError, match="'instructon'.*nearest: instruction"):
        make_env("maze:7x7").reset(options={"instructon": "travel to (1, 1)"})
    with pytest.raises(ValueError, match="it takes none"):
        make_env("wind:").reset(options={"instruction": "travel to (1, 1)"})


@pytest.mark.parametrize("name, rollouts", [
    ("darkkey:9x9", 40), ("darkkey:8x8?fixed_start=true", 40), ("darkkey:5x5", 100),
    ("tmaze:100", 60), ("tmaze:1", 400),
    ("wind:", 20), ("maze:7x7", 80), ("maze:15x15", 60), ("maze:31x31", 40), ("delivery:30", 200)])
def test_documented_random_return(name, rollouts):
    mean, error = mean_return(name, uniform, rollouts)
    assert mean == pytest.approx(make_env(name).references["random"], abs=4 * error + 0.01)


# ---- Dark Key-To-Door ----


def dark_key(start, key, door, size="3x4"):
    env = make_env(f"darkkey:{size}")
    env.reset(seed=0)
    env.start, env.key, env.door = start, key, door
    env.begin_episode()
    return env


def test_dark_key_rules():
    env = dark_key(start=(0, 1), key=(0, 0), door=(0, 2))
    same(env.observe(), np.float32([0, 1 / 4, 0, 0]))
    rewards, seen, infos = [], [], []
    for action in (EAST, NORTH, WEST, WEST, WEST, EAST, EAST, SOUTH):
        observation, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        seen.append(observation.tolist())
        infos.append(info)
        assert not terminated and not truncated
    # the door without the key is worth nothing, the key counts once, walls stop
    assert rewards == [0, 0, 0, 1, 0, 0, 1, 0]
    same(np.float32(seen[:4]), np.float32([[0, .5, 0, .02], [0, .5, 0, .04], [0, .25, 0, .06],
                                           [0, 0, 1, .08]]))
    # the door: the new episode's first observation takes the place of the last one
    same(np.float32(seen[6:]), np.float32([[0, .25, 0, 0], [1 / 3, .25, 0, .02]]))
    assert infos[6] == {"episode_return": 2.0, "reset": True} and not any(infos[:6] + infos[7:])


@pytest.mark.parametrize("door, rewards", [((1, 1), [1, 1, 1, 1]), ((1, 2), [1, 0, 0, 0])])
def test_dark_key_gives_at_most_one_reward_per_step(door, rewards):
    env = dark_key(start=(1, 1), key=(1, 1), door=door)
    assert [env.step(STAY)[1] for _ in rewards] == rewards


def test_dark_key_inner_and_outer_limit():
    env = dark_key(start=(0, 0), key=(2, 3), door=(2, 2))
    marks, ends = {}, []
    for t in range(1, 501):
        observation, _, terminated, truncated, info = env.step(STAY)
        ends.append((terminated, truncated))
        if info:
            marks[t] = info
    assert marks == {**{50 * i: {"episode_return": 0.0, "reset": True} for i in range(1, 10)},
                     500: {"episode_return": 0.0}}
    assert ends == [(False, False)] * 499 + [(False, True)]
    assert observation[3] == 1.0  # the very last observation is the terminal one


def test_dark_key_tasks():
    """Start, key and door last for the rollout, are independent, and reach every cell."""
    env = make_env("darkkey:2x3")
    tasks = set()
    for seed in range(1500):
        env.reset(seed=seed)
        tasks.add((env.start, env.key, env.door))
    assert len(tasks) > 200  # of 6 ** 3 = 216
    task = (env.start, env.key, env.door)
    for _ in range(300):
        env.step(env.action_space.sample())
    assert task == (env.start, env.key, env.door)
    fixed = make_env("darkkey:8x8?fixed_start=true")
    starts = {(fixed.reset(seed=seed), fixed.start)[1] for seed in range(20)}
    assert starts == {(0, 0)}


def towards(here, there):
    (row, column), (to_row, to_column) = here, there
    if row != to_row:
        return SOUTH if to_row > row else NORTH
    return STAY if column == to_column else EAST if to_column > column else WEST


def with_eyes_open(env):
    return lambda *_: towards(env.position, env.door if env.has_key else env.key)


def search(env):
    """From observations alone: search cell by cell, the nearest first, and remember."""
    possible = {sought: {(r, c) for r in range(env.rows) for c in range(env.columns)}
                for sought in (False, True)}  # of the key, of the door
    last = []

    def policy(observation, reward, info):
        if last:
            sought, cell = last
            if reward:
                possible[sought] = {cell}
            else:
                possible[sought].discard(cell)
        here = round(observation[0] * env.rows), round(observation[1] * env.columns)
        cells = possible[bool(observation[2])]

        def cost(cell):  # of two equally near cells, the one that would stay behind alone
            around = sum((cell[0] + down, cell[1] + right) in cells for down, right in STEPS[:4])
            return abs(cell[0] - here[0]) + abs(cell[1] - here[1]), around
        action = towards(here, min(cells, key=cost))
        last[:] = bool(observation[2]), (here[0] + STEPS[action][0], here[1] + STEPS[action][1])
        return action
    return policy


def test_dark_key_oracles():
    mean, error = mean_return("darkkey:9x9", search, 30)
    assert mean == pytest.approx(make_env("darkkey:9x9").references["best"], abs=4 * error)
    assert mean_return("darkkey:9x9", with_eyes_open, 100)[0] == pytest.approx(101, abs=20)
    # the best with eyes open, exactly: two rewards per shortest way there, and from there on
    for seed in range(20):
        env = make_env("darkkey:9x9")
        total, *_ = play(env, with_eyes_open, seed)
        to_key, to_door = (max(1, sum(abs(a - b) for a, b in zip(here, there)))
                           for here, there in ((env.start, env.key), (env.key, env.door)))
        whole, rest = divmod(500, to_key + to_door)
        assert total == 2 * whole + (rest >= to_key)


# ---- T-Maze ----


def remember(env):
    goal = []

    def policy(observation, reward, info):
        goal.append(observation[1])
        return 0 if not observation[0] else 1 if goal[0] > 0 else 3
    return policy


@pytest.mark.parametrize("length", [1, 2, 7, 100, 1500])
def test_t_maze_oracle_and_the_opposite(length):
    env = make_env(f"tmaze:{length}")
    for seed in range(6):
        total, steps, info = play(env, remember, seed)
        assert (total, steps, info) == (1.0, length + 1, {"success": 1.0})
        assert env.max_return == env.references["best"] == 1.0

    def forget(env):
        return lambda observation, *_: int(observation[0])
    returns = [play(env, forget, seed)[0] for seed in range(40)]
    assert set(returns) == {0.0, 1.0} and 8 <= sum(returns) <= 32


def test_t_maze_rules():
    env = make_env("tmaze:4")
    hint = env.reset(seed=0)[0]
    assert hint[0] == 0 and hint[1] in (-1, 1)
    up, down = (1, 3) if hint[1] > 0 else (3, 1)
    # west and across are walls here: a penalty, and the hint does not come back
    for action in (2, 1, 3):
        observation, reward, *ends, info = env.step(action)
        assert (observation.tolist(), reward, ends, info) == ([0, 0], -0.25, [False] * 2, {})
    assert env.step(0)[1] == 0.0
    observation, reward, terminated, truncated, info = env.step(up)
    assert observation.tolist() == [0, 0] and reward == 0.0  # too late
    assert (terminated, truncated, info) == (True, False, {"success": 0.0})

    env.reset(seed=0)
    seen = [env.step(action)[:2] for action in (0, 0, 0, 0)]
    assert [x.tolist() for x, _ in seen] == [[0, 0]] * 3 + [[1, 0]]
    assert all(reward == 0.0 for _, reward in seen)
    assert env.step(down)[0].tolist() == [1, -hint[1]] and env.y == -env.goal

    # beyond the junction there are walls to the sides: stay there until the end
    env = make_env("tmaze:2")
    env.reset(seed=0)
    env.x, env.y = 2, env.goal
    for action in (0, 2, 0):
        observation, reward, *_ = env.step(action)
        assert observation.tolist() == [1, env.goal]
    assert reward == 1.0


# ---- Wind ----


def against_the_wind(env):
    """The first step shows the wind, since it does not change."""
    last = []

    def policy(observation, reward, info):
        wind = observation - last[0] - 0.1 * last[1] if last else np.zeros(2)
        if len(last) == 3:
            wind = last[2]
        push = np.clip((np.array([0, 1]) - observation - wind) / 0.1, -1, 1).astype(np.float32)
        last[:] = [observation, push] + ([wind] if last else [])
        return push
    return policy


def test_wind_oracle():
    mean, error = mean_return("wind:", against_the_wind, 150)
    assert mean == pytest.approx(make_env("wind:").references["best"], abs=4 * error)


def test_wind_rules():
    env = make_env("wind:")
    winds = np.array([(env.reset(seed=seed), env.wind)[1] for seed in range(200)])
    assert winds.min() > -0.08 and winds.max() < 0.08
    np.testing.assert_allclose(winds.std(axis=0), 0.16 / np.sqrt(12), rtol=0.15)
    assert abs(np.corrcoef(winds.T)[0, 1]) < 0.3
    env.reset(seed=0)
    env.wind = [0.05, -0.02]
    observation = env.step(np.float32([1, 0.5]))[0]
    np.testing.assert_allclose(observation, [0.15, 0.03], atol=1e-6)
    observation = env.step(np.float32([-1, 0]))[0]
    np.testing.assert_allclose(observation, [0.10, 0.01], atol=1e-6)
    for x, y, reward in [(0, 1, 1), (0.029, 1, 1), (0.031, 1, 0), (0, 0.971, 1), (0.025, 1.025, 0)]:
        env.reset(seed=0)
        env.wind, env.position = [0.0, 0.0], (x, y)
        assert env.step(np.zeros(2, np.float32))[1] == reward
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(74)]
    assert ends == [(False, False)] * 73 + [(False, True)]


# ---- instructions ----


def test_hand_computed_rewards():
    """Two goals, the first one twice; a step that reaches several counts for one of them."""
    a, b, instruction = [1, 2], [3, 0], np.int32([[1, 2], [1, 2], [3, 0], [0, 0]])
    rewards, progress = [], 0
    for achieved in ([b], [], [b, a], [a, a], [[0, 0]], [a], [a, b], [b], [[0, 0]]):
        achieved = np.int32(achieved).reshape(-1, 2)
        reward, progress = envs.instruction_reward(instruction, progress, achieved)
        rewards.append((reward, progress))
    assert rewards == [(0, 0), (0, 0), (1, 1), (1, 2), (0, 2), (0, 2), (1, 3), (0, 3), (0, 3)]
    full = np.int32([[1, 2]])
    assert envs.instruction_reward(full, 1, full) == (0.0, 1)


def test_statuses():
    instruction = np.int32([[5, 1], [5, 1], [0, 0]])
    for progress, statuses in [(0, [ACTIVE, WAITING, 0]), (1, [DONE, ACTIVE, 0]),
                               (2, [DONE, DONE, 0])]:
        shown = envs.show_instruction(instruction, progress)
        assert shown.dtype == np.int32 and shown[:, 0].tolist() == statuses
        same(shown[:, 1:], instruction)
    assert envs.show_instruction(instruction[:2], 2)[:, 0].tolist() == [DONE, DONE]
    assert (envs.NO_GOAL, WAITING, ACTIVE, DONE) == (0, 1, 2, 3)


GOALS = st.lists(st.integers(0, 3), min_size=2, max_size=2)


@FUZZ
@given(st.lists(GOALS, min_size=1, max_size=5), st.integers(0, 5),
       st.lists(GOALS, max_size=4))
def test_reward_invariants(instruction, progress, achieved):
    """Pays 0 or 1 and moves by as much; needs the next goal; order and repeats do not matter."""
    instruction = np.int32(instruction)
    progress = min(progress, len(instruction))
    achieved = np.int32(achieved).reshape(-1, 2)
    before = instruction.copy(), achieved.copy()
    reward, after = envs.instruction_reward(instruction, progress, achieved)
    same((instruction, achieved), before)  # pure
    assert reward in (0.0, 1.0) and after - progress == reward
    right = progress < len(instruction) and instruction[progress, 0] != 0 and any(
        np.array_equal(goal, instruction[progress]) for goal in achieved)
    assert reward == right
    assert (reward, after) == envs.instruction_reward(
        instruction, progress, np.concatenate([achieved[::-1], achieved]))


@pytest.mark.parametrize("name", INSTRUCTED)
def test_rollouts_follow_the_reward_and_show(name):
    env = make_env(name, seed=0)
    env.action_space.seed(0)
    for _ in range(3):
        observation, _ = env.reset()
        progress, over = 0, False
        instruction = env.instruction.copy()
        while not over:
            same(observation["instruction"], env.show(instruction, progress))
            assert observation["instruction"].dtype == np.int32 and env.progress == progress
            observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert info["achieved"].dtype == np.int32 and info["achieved"].shape[1:] == (env.words,)
            assert len(info["achieved"]) <= env.max_achieved
            expected, progress = env.reward(instruction, progress, info["achieved"])
            assert reward == expected
            over = terminated or truncated
            if over:
                done = int((instruction[:, 0] != 0).sum()) == progress
                assert terminated == done and set(info) == {"achieved", "success", "goals_done"}
                assert (info["success"], info["goals_done"]) == (float(done), progress)
            else:
                assert set(info) == {"achieved"}
        same(env.instruction, instruction)


@pytest.mark.parametrize("name, text, array", [
    ("maze:7x7", "travel to (1, 2), travel to (5, 5) x2", [[1, 2], [5, 5], [5, 5]]),
    ("maze:7x7", "  travel   to ( 1,2 ) ", [[1, 2], [0, 0], [0, 0]]),
    ("delivery:30", "deliver to 7, deliver to 29", [[7], [29], [0], [0]]),
    ("delivery:30", "deliver to 3 x4", [[3]] * 4)])
def test_instructions_as_text(name, text, array):
    env = make_env(name)
    parsed = env.parse_instruction(text)
    assert parsed.dtype == np.int32
    same(parsed, array)
    canonical = env.format_instruction(parsed)
    assert canonical == env.format_instruction(np.int64(array))
    same(env.parse_instruction(canonical), array)
    assert canonical == text or text.startswith(" ")
    for given_instruction in (text, parsed, parsed.tolist(), parsed[parsed[:, 0] != 0]):
        env.reset(seed=1, options={"instruction": given_instruction})
        same(env.instruction, array)
    env.reset(seed=1)  # for that one episode only
    same(env.instruction, make_env(name).reset(seed=1)[0]["instruction"][:, 1:])
    assert make_env(name, instruction=parsed).name == make_env(name, instruction=text).name
    fixed = make_env(name, instruction=text)
    for _ in range(2):
        fixed.reset()
        same(fixed.instruction, array)
    assert fixed.name == f"{name}?instruction={canonical}" == make_env(fixed.name).name
    assert fixed.references["best"] == (parsed[:, 0] != 0).sum()


@pytest.mark.parametrize("name, text, canonical", [
    ("maze:7x7", "go to (3, 5), go to (1, 1)", "travel to (3, 5), travel to (1, 1)"),
    ("maze:7x7", "Travel To (3,5), GO TO (1, 1) X2", "travel to (3, 5), travel to (1, 1) x2"),
    ("delivery:30", "Go to 7, travel to 8, DELIVER TO 9 x2",
     "deliver to 7, deliver to 8, deliver to 9 x2"),
    ("crafter:instructions", "Go To (10, 50), EAT COW X2", "travel to (10, 50), eat cow x2")])
def test_other_words_for_the_same(name, text, canonical):
    env = make_env(name, instruction=text)
    assert env.name == f"{name}?instruction={canonical}"
    same(env.parse_instruction(text), env.parse_instruction(canonical))
    assert env.format_instruction(env.parse_instruction(text)) == canonical


@pytest.mark.parametrize("name, instruction, fragments", [
    ("maze:7x7", "travel too (1, 1)", ["' in maze:7x7; nearest: travel to (1, 1)"]),
    ("maze:7x7", "", ["unknown goal ''"]), ("maze:7x7", ",", ["unknown goal ''"]),
    ("maze:7x7", "travel to (0, 1)", ["(0, 1) is not inside maze:7x7", "rows are 1 to 5"]),
    ("maze:7x9", "travel to (70, 1)", ["columns 1 to 7; nearest: travel to (5, 1)"]),
    ("maze:7x9", "go to (0, 8)", ["rows are 1 to 5, columns 1 to 7; nearest: travel to (1, 7)"]),
    ("maze:7x7", "travel to (1, 1) x0", ["unknown goal 'travel to (1, 1) x0'"]),
    ("maze:7x7", "travel to (1, 1) x4", ["maze:7x7 takes 1 to 3 goals, not 4"]),
    ("maze:7x7?goals=1", "travel to (1, 1), travel to (1, 2)", ["takes 1 to 1 goals, not 2"]),
    ("maze:7x7", [[1, 2, 3]], ["shape (goals, 2)"]), ("maze:7x7", [1, 2], ["shape (goals, 2)"]),
    ("maze:7x7", [[1.0, 2.0]], ["whole numbers"]), ("maze:7x7", 5, ["not '5'"]),
    ("maze:7x7", [[1, 6]], ["(1, 6) is not inside"]), ("maze:7x7", [[0, 0]], ["unknown goal"]),
    ("maze:7x7", "travel to (1, 1)\n" * 99, ["..."]),
    ("delivery:30", "deliver to 30", ["cells are 1 to 29; nearest: deliver to 29"]),
    ("delivery:30", "deliver to 0", ["cell 0"]), ("delivery:30", [[-1]], ["cell -1"]),
    ("delivery:30", "deliver to 123456", ["cells are 1 to 29; nearest: deliver to 29"]),
    ("maze:7x7", "go to (-1, 99999)", ["(-1, 99999) is not inside", "travel to (1, 5)"]),
    ("delivery:30", "deliver 7", ["goal 'deliver 7' in delivery:30; nearest: deliver to 7"]),
    ("delivery:30", "deliver to 1 x5", ["1 to 4 goals, not 5"])])
def test_impossible_instructions(name, instruction, fragments):
    env = make_env(name)
    env.reset(seed=0)
    for attempt in (lambda: env.reset(options={"instruction": instruction}),
                    lambda: make_env(name, instruction=instruction)):
        with pytest.raises(ValueError) as error:
            attempt()
        message = str(error.value)
        assert len(message.splitlines()) == 1 and len(message) < 250
        assert all(fragment in message for fragment in fragments), message


def test_goals_after_an_empty_row_are_not_dropped_silently():
    with pytest.raises(ValueError, match="after an empty"):
        make_env("maze:7x7").reset(options={"instruction": [[1, 1], [0, 0], [2, 2]]})


MAZE, ROAD = make_env("maze:15x15?goals=5"), make_env("delivery:30")
PIECES = st.sampled_from(["travel to ", "deliver to ", "Go to ", "(", ")", ",", ", ", " ", "x",
                          " x2", "0", "1", "7", "13", "-", "99999999999999999999", "\n", "\x85",
                          "٣", "é"])


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(st.lists(st.text(max_size=30) | st.lists(PIECES, max_size=12).map("".join),
                min_size=20, max_size=20))
def test_10000_strings_parse_or_explain(texts):
    for text in texts:
        for env in (MAZE, ROAD):
            try:
                instruction = env.parse_instruction(text)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 250
            else:
                again = env.parse_instruction(env.format_instruction(instruction))
                same(again, instruction)
                assert env.show(instruction, 0) in env.observation_space["instruction"]


@FUZZ
@given(st.lists(st.tuples(st.integers(1, 13), st.integers(1, 13)), min_size=1, max_size=5),
       st.lists(st.integers(1, 29), min_size=1, max_size=4))
def test_parse_inverts_format(cells, places):
    for env, goals in ((MAZE, cells), (ROAD, [[place] for place in places])):
        instruction = np.zeros((env.max_goals, env.words), np.int32)
        instruction[:len(goals)] = goals
        same(env.parse_instruction(env.format_instruction(instruction)), instruction)


# ---- mazes ----


def distances(wall, goal):
    """Breadth first from the goal. {cell: steps}"""
    found, queue = {goal: 0}, collections.deque([goal])
    while queue:
        row, column = queue.popleft()
        for down, right in STEPS[:4]:
            there = row + down, column + right
            if not wall[there[0]][there[1]] and there not in found:
                found[there] = found[row, column] + 1
                queue.append(there)
    return found


def with_a_map(env):
    def policy(observation, reward, info):
        steps = distances(env.wall, tuple(env.instruction[env.progress].tolist()))
        row, column = env.position
        reached = [(row + STEPS[move][0], column + STEPS[move][1]) for move in env.wiring]
        return min(range(5), key=lambda action: steps.get(reached[action], 10**6))
    return policy


@pytest.mark.parametrize("name", ["maze:5x5", "maze:7x7?goals=2", "maze:15x15?rewired=1",
                                  "maze:31x31?goals=5"])
def test_maze_oracle(name):
    env = make_env(name)
    goals = []
    for seed in range(12):
        total, steps, info = play(env, with_a_map, seed)
        assert total == env.goals and info["success"] == 1.0 and info["goals_done"] == total
        assert steps < env.horizon
        goals.append(total)
    spread = np.sqrt((env.max_goals ** 2 - 1) / 12 / len(goals))  # of uniform numbers
    assert np.mean(goals) == pytest.approx(env.references["best"], abs=4 * spread)


@FUZZ
@given(st.integers(2, 16), st.integers(2, 16), st.integers(0, 2**31 - 1), st.data())
def test_every_free_cell_can_be_reached(rows, columns, seed, data):
    rows, columns = 2 * rows + 1, 2 * columns + 1
    wall = envs.draw_maze(rows, columns, np.random.default_rng(seed))
    assert wall.shape == (rows, columns) and wall.dtype == bool
    assert wall[0].all() and wall[-1].all() and wall[:, 0].all() and wall[:, -1].all()
    start = rows - 2, columns // 2
    assert len(distances(wall, start)) == (~wall).sum()
    inside = st.tuples(st.integers(1, rows - 2), st.integers(1, columns - 2))
    cells = data.draw(st.lists(inside, min_size=1, max_size=5))
    envs.open_cells(wall, cells)
    assert set(cells) <= set(distances(wall, start))
    assert wall[0].all() and wall[-1].all() and wall[:, 0].all() and wall[:, -1].all()


def test_goals_in_walls_can_be_reached():
    wall = np.array([[cell == "#" for cell in row] for row in (
        "#######", "#.#...#", "####..#", "#.#...#", "#...#.#", "#.....#", "#######")])
    envs.open_cells(wall, [(4, 4)])
    assert (~wall).sum() == 20 and not wall[4, 4]  # next to free cells: no more is opened
    envs.open_cells(wall, [(2, 2)])  # hedges on all four sides
    assert (~wall).sum() == 22 and not wall[2, 2] and not wall[2, 1]
    env = make_env("maze:9x9?instruction=travel to (2, 2), travel to (4, 4), travel to (7, 3)")
    assert all(play(env, with_a_map, seed)[0] == 3.0 for seed in range(10))


def test_mazes_are_mazes():
    walls = [envs.draw_maze(15, 15, np.random.default_rng(seed)) for seed in range(50)]
    inside = np.mean([wall[1:10, 1:-1] for wall in walls])
    assert 0.4 < inside < 0.55 and len({wall.tobytes() for wall in walls}) == 50
    strip = walls[0][10:]  # where the agent starts, the same in all mazes
    assert all((wall[10:] == strip).all() for wall in walls)
    drawn = ["#.............#", "#.....#.#.....#", "#.....#.#.....#", "#.....#.#.....#", "#" * 15]
    assert ["".join(".#"[cell] for cell in row) for row in strip.astype(int)] == drawn


def test_maze_rules():
    env = make_env("maze:15x15?goals=2")
    observation, _ = env.reset(seed=0, options={"instruction": [[13, 7], [11, 7]]})
    # free cells: corridor of the strip, walls on both sides; how far north depends on the maze
    north = next(n for n in range(14) if env.wall[12 - n][7])
    same(observation["vector"], np.float32([13 / 15, 7 / 15, 0, north / 15, 0, 0]))
    same(observation["instruction"], [[ACTIVE, 13, 7], [WAITING, 11, 7]])
    for action in (WEST, EAST, SOUTH, STAY):  # walls, walls, walls, and standing still
        observation, reward, *ends, info = env.step(action)
        same(info["achieved"], [[13, 7]])  # the start counts only once a step was made
        assert reward == (1.0 if action == WEST else 0.0) and env.position == (13, 7)
    env.step(NORTH)
    observation, reward, terminated, truncated, info = env.step(NORTH)
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert (info["success"], info["goals_done"]) == (1.0, 2)
    same(observation["instruction"], [[DONE, 13, 7], [DONE, 11, 7]])
    same(observation["vector"][[0, 5]], np.float32([11 / 15, 2 / 15]))


@pytest.mark.parametrize("name", ["maze:15x9", "maze:7x7?position=0"])
def test_views_count_free_cells(name):
    env = make_env(name)
    env.reset(seed=3)
    size = {NORTH: env.rows, SOUTH: env.rows, WEST: env.columns, EAST: env.columns}
    for row, column in np.argwhere(~np.array(env.wall)).tolist():
        free = []
        for direction in (WEST, NORTH, EAST, SOUTH):
            down, right = STEPS[direction]
            n = 0
            while not env.wall[row + (n + 1) * down][column + (n + 1) * right]:
                n += 1
            free.append(n / size[direction])
        place = [] if "position" in name else [row / env.rows, column / env.columns]
        same(env.views[row, column], np.float32([*place, *free]))


def test_rewired_mazes():
    env, wirings = make_env("maze:9x9?rewired=1"), set()
    plain = make_env("maze:9x9")
    for seed in range(200):
        env.reset(seed=seed)
        plain.reset(seed=seed)
        assert plain.wiring == [WEST, NORTH, EAST, SOUTH, STAY]
        assert sorted(env.wiring) == plain.wiring and env.wiring[STAY] == STAY
        wirings.add(tuple(env.wiring))
    assert len(wirings) == 24  # all orders of four directions
    env.position = (5, 4)  # where all four directions are free
    env.wall[5][4] = env.wall[5][3] = env.wall[5][5] = env.wall[4][4] = env.wall[6][4] = False
    for action in range(5):
        down, right = STEPS[env.wiring[action]]
        env.position = (5, 4)
        env.step(action)
        assert env.position == (5 + down, 4 + right)


def test_maze_goals_and_horizons():
    env, counts, cells = make_env("maze:7x7"), collections.Counter(), set()
    for seed in range(400):
        env.reset(seed=seed)
        goals = [tuple(goal) for goal in env.instruction.tolist() if goal[0]]
        counts[len(goals)] += 1
        cells.update(goals)
        assert len(set(goals)) == len(goals) == env.goals and env.start not in goals
        assert not any(env.wall[row][column] for row, column in goals)
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 90
    assert len(cells) > 18
    horizons = {7: 100, 15: 400, 30: 1000, 31: 1000, 5: 25}
    assert {n: make_env(f"maze:{n}x{n}").horizon for n in horizons} == horizons
    assert make_env("maze:30x30").name == "maze:31x31"
    assert make_env("maze:30x30?goals=3&rewired=0&position=1").name == "maze:31x31"
    assert make_env("maze:7x7?goals=1").max_return == 1.0
    assert make_env("maze:7x7").max_return is None


# ---- delivery ----


def road(instruction="deliver to 1, deliver to 4"):
    env = make_env("delivery:12")
    env.reset(seed=0, options={"instruction": instruction})
    env.forks, env.drop = {2: env.LEFT, 11: env.RIGHT}, env.DROP + 1
    return env


def test_delivery_rules():
    env = road()
    forward, left, right, wait = env.FORWARD, env.LEFT, env.RIGHT, env.WAIT
    wrong, good = env.DROP, env.DROP + 1
    script = [  # action, then cell, packages left, at a fork, reward, achieved
        (left, 0, 6, 0, 0, []), (right, 0, 6, 0, 0, []), (good, 0, 6, 0, 0, []),
        (forward, 1, 6, 0, 0, []), (wait, 1, 6, 0, 0, []), (left, 1, 6, 0, 0, []),
        (wrong, 0, 6, 0, 0, []), (forward, 1, 6, 0, 0, []),
        (good, 1, 5, 0, 1, [[1]]), (good, 1, 4, 0, 0, [[1]]),  # the second is too much
        (forward, 2, 4, 1, 0, []), (forward, 2, 4, 1, 0, []), (good, 2, 4, 1, 0, []),
        (wrong, 2, 4, 1, 0, []), (wait, 2, 4, 1, 0, []),
        (right, 0, 4, 0, 0, []),  # the wrong side
        (forward, 1, 4, 0, 0, []), (forward, 2, 4, 1, 0, []), (left, 3, 4, 0, 0, []),
        (good, 3, 3, 0, 0, [[3]]),  # no destination: reached all the same
        (forward, 4, 3, 0, 0, [])]
    for action, *expected in script:
        observation, reward, terminated, truncated, info = env.step(action)
        got = [*observation["vector"].tolist(), reward, info["achieved"].tolist()]
        assert got == expected and not terminated and not truncated
    *_, reward, terminated, truncated, info = env.step(good)
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, 1.0)


def test_delivery_without_packages_and_around():
    env = road("deliver to 5")
    env.position, env.packages = 4, 1
    assert env.step(env.drop)[4]["achieved"].tolist() == [[4]]
    observation, _, _, _, info = env.step(env.drop)  # none left
    assert observation["vector"].tolist() == [0, 0, 0] and info["achieved"].shape == (0, 1)
    env.position = 11
    assert env.step(env.RIGHT)[0]["vector"][0] == 0  # around
    env.forks = {}
    env.position = 11
    assert env.step(env.FORWARD)[0]["vector"][0] == 0
    steps = 4
    while not (ends := env.step(env.WAIT)[2:4])[1]:
        steps += 1
    assert (steps + 1, ends) == (6 * 12, (False, True))


def test_delivery_tasks():
    env = make_env("delivery:30")
    forks, goals, drops, sides = (collections.Counter() for _ in range(4))
    for seed in range(300):
        env.reset(seed=seed)
        cells = [goal[0] for goal in env.instruction.tolist() if goal[0]]
        assert cells == sorted(set(cells)) and not set(cells) & set(env.forks)
        assert all(1 <= cell <= 29 for cell in [*cells, *env.forks])
        assert env.packages == 3 * len(cells)
        forks[len(env.forks)] += 1
        goals[len(cells)] += 1
        drops[env.drop] += 1
        sides.update(env.forks.values())
    assert set(forks) == {2, 3, 4, 5, 6} and min(forks.values()) > 35
    assert set(goals) == {2, 3, 4} and min(goals.values()) > 70
    assert set(drops) == {3, 4, 5, 6} and min(drops.values()) > 45
    assert set(sides) == {1, 2} and min(sides.values()) > 500
    for _ in range(30):  # forks keep away from a given instruction
        env.reset(options={"instruction": "deliver to 1, deliver to 29"})
        assert not {1, 29} & set(env.forks)
    short = make_env("delivery:11")
    for seed in range(50):
        short.reset(seed=seed)


def try_and_remember(env):
    """From observations alone: learn the sides and the drop by trying, each wrong one once."""
    sides, drops, last = {}, [3, 4, 5, 6], []

    def policy(observation, reward, info):
        cell, packages, fork = map(int, observation["vector"])
        if last:
            before, had, action = last
            if action in (1, 2):
                sides[before] = action if cell == (before + 1) % env.length else 3 - action
            elif action in drops and packages == had:
                drops.remove(action)
            elif action in drops:
                drops[:] = [action]
        active = [goal[1] for goal in observation["instruction"] if goal[0] == ACTIVE]
        if fork:
            action = sides.get(cell, 1)
        else:
            action = drops[0] if cell and (len(drops) > 1 or cell == active[0]) else 0
        last[:] = cell, packages, action
        return action
    return policy


def test_delivery_oracle():
    env = make_env("delivery:30")
    results = [play(env, try_and_remember, seed) for seed in range(150)]
    assert all(info["success"] == 1.0 for _, _, info in results)
    mean = np.mean([total for total, *_ in results])
    assert mean == pytest.approx(env.references["best"], abs=4 * np.sqrt(2 / 3 / 150))


# ---- cheetah and metaworld ----

needs = {module: pytest.mark.skipif(importlib.util.find_spec(module) is None,
                                    reason=f"{module} is not installed")
         for module in ("mujoco", "metaworld")}


@pytest.mark.parametrize("name, resets", [
    pytest.param("cheetah:vel", [200, 400], marks=needs["mujoco"]),
    pytest.param("metaworld:reach?episodes=2", [500], marks=needs["metaworld"]),
    pytest.param("metaworld:push?episodes=3&split=test", [500, 1000], marks=needs["metaworld"])])
def test_simulated_robots(name, resets):
    env, twin = make_env(name), make_env(name, seed=8)
    assert env.name == name
    env.action_space.seed(0)
    twin.reset()
    first = env.reset(seed=3)[0]
    same(twin.reset(seed=3)[0], first)
    got, ends, done = [], [], False
    while not done:
        action = env.action_space.sample()
        result = env.step(action)
        same(twin.step(action), result)
        ends.append(result[2:4])
        done = any(ends[-1])
        if "reset" in result[4]:
            got.append(len(ends))
            same(result[0], first)  # the same task from the same beginning
    assert got == resets and ends[-1] == (False, True) and len(ends) == env.horizon
    assert name == "cheetah:vel" or result[4]["success"] in (0.0, 1.0)


@needs["mujoco"]
def test_cheetah_random_return():
    mean, error = mean_return("cheetah:vel", uniform, 15)
    assert mean == pytest.approx(make_env("cheetah:vel").references["random"], abs=4 * error)


@needs["mujoco"]
def test_cheetah_reward():
    env = make_env("cheetah:vel")
    targets = []
    for seed in range(100):
        env.reset(seed=seed)
        targets.append(env.inner.inner.target)
    assert 0 <= min(targets) < 0.3 and 2.7 < max(targets) <= 3
    action = np.full(6, 0.5, np.float32)
    before = env.inner.inner.unwrapped.data.qpos[0]
    reward = env.step(action)[1]
    speed = (env.inner.inner.unwrapped.data.qpos[0] - before) / env.inner.inner.unwrapped.dt
    assert reward == pytest.approx(-abs(speed - targets[-1]) - 0.05 * 6 * 0.25)


@needs["mujoco"]
def test_standing_still_is_better_than_random_and_worse_than_the_papers_agent():
    still = lambda env: lambda *_: np.zeros(6, np.float32)  # noqa: E731
    mean, error = mean_return("cheetah:vel", still, 20)
    assert mean == pytest.approx(-931, abs=4 * error)
    references = make_env("cheetah:vel").references
    assert references["random"] < -931 < references["paper"]


@needs["mujoco"]
def test_a_gallop_that_knows_the_target():
    """The best policy that we know: sines, faster and wider the faster it is to run (the first line
    below), a phase for each joint, and some balance. Found by the cross-entropy method."""
    w0, w1, a0, a1, a2 = 9.33, 4.46, 0.53, 0.27, 0.49
    rest, swing, phase, pitch, turn = np.array([
        [0.05, -0.16, 0.15, -0.18, -0.09, -0.21],
        [0.2, -1.34, 0.55, 0.3, -0.28, -0.2],
        [0.46, -0.92, -0.92, -2.61, 0.5, 0.62],
        [-0.28, 0.3, 0.51, 0.49, -0.03, -0.1],
        [-0.03, 0.1, -0.18, -0.01, 0.09, -0.07]])

    def gallop(env):
        target, steps = env.inner.inner.target, itertools.count()

        def act(observation, reward, info):
            time = 0.05 * (next(steps) % 200)
            wide = np.clip(a0 + a1 * target + a2 * (target - observation[8]), 0, 3)
            balance = pitch * observation[1] + turn * observation[10]
            sines = swing * np.sin((w0 + w1 * target) * time + phase)
            return np.clip(rest + wide * sines + balance, -1, 1).astype(np.float32)
        return act
    env = make_env("cheetah:vel")
    returns = np.sort([play(env, gallop, seed)[0] for seed in range(20)])
    assert np.median(returns) == pytest.approx(-127, abs=20)
    assert returns[1] > -250 and returns[-1] > -90      # one of a hundred falls on its back


@needs["metaworld"]
def test_ml45_simulates_the_class_that_was_drawn():
    """Catches a simulator that is still that of the rollout before."""
    env, first = make_env("metaworld:ML45"), []
    for seed in range(4):
        first.append(env.reset(seed=seed)[0])
        assert np.array_equal(first[-1], make_env("metaworld:ML45").reset(seed=seed)[0])
    assert len({x.tobytes() for x in first}) == 4


@needs["metaworld"]
@pytest.mark.parametrize("name, policy, rollouts", [
    ("reach", "SawyerReachV3Policy", 5), ("push", "SawyerPushV3Policy", 5),
    ("pick-place", "SawyerPickPlaceV3Policy", 5)])
def test_best_known_return_of_a_robot_arm(name, policy, rollouts):
    """The package's own policy, whose eyes are opened: the goal is put where it was blanked."""
    policies = importlib.import_module("metaworld.policies")

    def with_the_goal(env):
        script = getattr(policies, policy)()

        def act(observation, reward, info):
            seen = np.append(observation[:-3].astype(np.float64), env.inner.inner.arm._target_pos)
            return np.clip(script.get_action(seen), -1, 1).astype(np.float32)
        return act
    env = make_env(f"metaworld:{name}?episodes=2")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Constant")
        mean, error = mean_return(env.name, with_the_goal, rollouts)
    assert mean == pytest.approx(env.references["best"], abs=5 * error + 50) and mean > 6000
    mean, error = mean_return(env.name, uniform, rollouts)
    assert mean == pytest.approx(env.references["random"], abs=5 * error + 1)
    tripled = make_env(f"metaworld:{name}?episodes=3").references
    assert tripled["best"] == pytest.approx(1.5 * env.references["best"])


# ---- pictures and the command line ----


def colours(picture):
    return set(map(tuple, picture.reshape(-1, 3).tolist()))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("tmaze", "wind"))])
def test_pictures(name):
    env = make_env(name, seed=0)
    env.reset()
    picture = env.render()
    assert picture.dtype == np.uint8 and 200 <= max(picture.shape[:2]) <= 256
    assert picture.shape[2] == 3 and envs.AGENT in colours(picture)
    same(env.render(), picture)
    env.position = (1, 1) if env.position != (1, 1) else (1, 2)
    if name.startswith("delivery"):
        env.position = 3
    assert not np.array_equal(env.render(), picture)  # the agent is seen to move


@pytest.mark.parametrize("name", ["maze:31x31", "maze:101x101", "maze:127x127", "darkkey:128x128",
                                  "delivery:600"])
def test_the_agent_is_seen_in_large_pictures(name):
    """Catches discs that fall between the pixels, and an agent hidden by the digit of its goal."""
    env = make_env(name, seed=0)
    env.reset()
    assert (env.render() == envs.AGENT).all(-1).any()
    if name == "maze:31x31":
        row, column = env.position
        env.reset(seed=0, options={"instruction": f"travel to ({row}, {column})"})
        env.position = (row, column)
        assert (env.render() == envs.AGENT).all(-1).sum() >= 8


@pytest.mark.parametrize("name, text, progress", [
    ("maze:7x7", "go to (1, 1), go to (5, 1), go to (1, 1)", 2),
    ("delivery:30", "deliver to 7 x2", 1)])
def test_of_two_goals_in_one_place_the_next_one_is_seen(name, text, progress):
    """Catches a goal drawn as done, in grey, though it is asked for once more: red."""
    env = make_env(name, seed=0)
    env.reset(seed=0, options={"instruction": text})
    env.progress, red = progress, envs.goal_colour(0, 0)
    assert red in colours(env.render())


def test_pictures_show_the_goals_in_order():
    env = make_env("maze:15x15")
    env.reset(seed=0, options={"instruction": "travel to (1, 1), travel to (1, 3)"})
    _, size = envs.draw_cells(env.wall)

    def corner(row, column):  # of the cell: the digit is in the middle
        return tuple(env.render()[row * size, column * size].tolist())
    active, waiting, done = envs.goal_colour(0, 0), envs.goal_colour(1, 0), envs.goal_colour(0, 1)
    assert len({active, waiting, done, envs.FLOOR, envs.WALL}) == 5
    assert (corner(1, 1), corner(1, 3)) == (active, waiting)
    first = env.render()[size:2 * size, size:2 * size]
    assert (0, 0, 0) in colours(first)
    env.progress = 1
    assert (corner(1, 1), corner(1, 3)) == (done, active)
    assert corner(0, 0) == envs.WALL and corner(13, 7) == envs.FLOOR
    road_picture = make_env("delivery:30", seed=0)
    road_picture.reset()
    assert {active, waiting, envs.FORK, envs.DOOR} <= colours(road_picture.render())


def test_half_blocks():
    picture = np.zeros((8, 4, 3), np.uint8)
    picture[:, 2:] = 200
    picture[4:6, :2] = (10, 20, 30)
    lines = envs.half_blocks(picture, 2, 100).splitlines()
    assert len(lines) == 2 and all(line.count("\u2580") == 2 for line in lines)
    assert lines[1].startswith("\x1b[38;2;10;20;30;48;2;0;0;0m\u2580\x1b[38;2;200;200;200;48;2;200")
    assert envs.half_blocks(picture, 100, 100).count("\u2580") == 4 * 4  # never enlarged


def run(monkeypatch, capsys, arguments, typed=""):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    code = envs.main(arguments)
    return code, *capsys.readouterr()


def test_play(monkeypatch, capsys):
    command = ["maze:15x15", "--play", "--seed", "0", "--instruction",
               "travel to (12, 7), travel to (11, 7)"]
    code, out, err = run(monkeypatch, capsys, command, "w?a\nww")
    assert (code, err) == (0, "") and out.endswith("the end: return 2, success 1\n")
    assert "[x] travel to (12, 7)  [ ] travel to (11, 7)" in out and "\u2580" in out
    assert "step 3 of at most 400: key 'w', reward 1, return 2" in out
    for typed in ("wq" + 9 * "w", "w"):  # quit, and a pipe that ends
        code, out, _ = run(monkeypatch, capsys, command, typed)
        assert code == 0 and "step 1" in out and "step 2" not in out
    for name, typed in [("darkkey:9x9", "wasd w"), ("delivery:30", "w1 q"), ("tmaze:9", "d" * 10),
                        ("popgym:RepeatFirst", "0123"), ("gym:CartPole-v1", "01q")]:
        code, out, err = run(monkeypatch, capsys, [name, "--play"], typed)
        assert (code, err) == (0, "") and "step 2" in out
        assert ("(or arrows)" in out) == (name[0] in "dt"), name  # those that move
    # the keys, and the instruction, of the environment inside
    code, out, err = run(monkeypatch, capsys, ["meta:maze:7x7?goals=1", "--play"], "wwq")
    assert (code, err) == (0, "") and "key 'w'" in out and "[ ] travel to (" in out


@pytest.mark.parametrize("arguments, fragment", [
    (["maze:7x7", "--play", "--instruction", "fly to (1, 1)"], "nearest: travel to"),
    (["maze:7x7", "--instruction", "travel to (9, 9)"], "(9, 9) is not inside maze:7x7"),
    (["popgym:RepeatFirst", "--instruction", "travel to (9, 9)"], "has no instructions"),
    (["maze:7x7", "--pley"], "unknown option --pley; nearest: --play"),
    (["maze:7x7", "--pl\ney"], "unknown option"), (["maze:7x7", "a\nb"], "unknown option a b"),
    (["maze:7x7", "--seed", "x"], "--seed: 'x' is not a whole number"),
    (["maze:7x7", "--seed", "-1", "--play"], "--seed -1"), (["maze:7x7", "word"], "word"),
    (["maze:7x7", "--play", "--seed"], "--seed"), (["maze:7x7", "--instruction"], "--instruction"),
    (["wind:", "--play"], "no keys"), (["--play"], "need the name"), (["maze:7"], "maze:7x7"),
    (["maze:7x7", "--seed", "3"], "--seed goes with --play"), ([""], "the name is empty"),
    (["darkkey:9x9", "--instruction", "eat cow"], "has no instructions"),
    (["maze:7x7", "darkkey:9x9"], "unknown option darkkey:9x9")])
def test_mistakes_on_the_command_line(monkeypatch, capsys, arguments, fragment):
    code, out, err = run(monkeypatch, capsys, arguments)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and fragment in err


def test_a_broken_environment_has_no_card(monkeypatch, capsys):
    """Catches a traceback, and exit code 2, which blames the arguments."""
    def broken(name):
        raise envs.BrokenEnvironment(f"{name}: the reward is nan")
    monkeypatch.setattr(envs, "print_card", broken)
    code, out, err = run(monkeypatch, capsys, ["tmaze:5"])
    assert (code, out) == (1, "") and len(err.splitlines()) == 1 and "tmaze:5" in err


def test_card_and_speed(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, ["delivery:30"])
    assert code == 0 and "vector 3 + instruction 4x2" in out
    assert "memory, adaptation, instructions" in out
    assert float(re.search(r"steps/s +([0-9,]+)", out)[1].replace(",", "")) > 1000
    listed = dict(envs.list_envs())
    assert {"darkkey:9x9", "tmaze:100", "wind:", "maze:15x15", "delivery:30"} <= set(listed)
    assert all(make_env(name).name == name for name in listed if name[:6] in ("darkke", "maze:7"))


@pytest.mark.parametrize("name, fragments", [
    ("maze:4x4", ["'maze:4x4'", "5 to 999", "nearest: maze:5x5"]),
    ("maze:9", ["nearest: maze:9x9"]), ("maze:", ["nearest: maze:9x9"]),
    ("maze:15", ["nearest: maze:15x15"]), ("maze:2000x7", ["nearest: maze:999x7"]),
    ("darkkey:9x9?size=3", ["'size'", "nearest: fixed_start"]), ("maze:7x7?self=1", ["'self'"]),
    ("tmaze:100?length=5", ["'length'", "it takes none"]), ("wind:?self=1", ["'self'"]),
    ("delivery:30?length=9", ["'length'"]), ("crafter:undirected?self=1", ["'self'"]),
    ("maze:7x7?goals=0", ["'goals'", "not 0"]),
    ("maze:7x7?goals=6", ["1 to 5, not 6; nearest: goals=5"]),
    ("maze:7x7?rewired=2", ["'rewired'", "not 2; nearest: rewired=true"]),
    ("maze:7x7?position=no", ["'position'", "not 'no'"]),
    ("maze:7x7?rewire=1", ["'rewire'", "nearest: rewired"]),
    ("delivery:10", ["11 to 9999", "nearest: delivery:11"]), ("delivery:x", ["delivery:100"]),
    ("delivery:30?goals=2", ["'goals'", "nearest: instruction"]),
    ("darkkey:1x9", ["2 to 999", "nearest: darkkey:2x9"]), ("darkkey:", ["darkkey:9x9"]),
    ("darkkey:9x9?fixed_start=maybe", ["'fixed_start'", "not 'maybe'"]),
    ("darkkey:9x9?fixed=1", ["nearest: fixed_start"]),
    ("tmaze:0", ["1 to 100000", "nearest: tmaze:1"]), ("tmaze:100001", ["nearest: tmaze:100000"]),
    ("tmaze:-5", ["nearest: tmaze:1"]), ("tmaze:999999999999", ["nearest: tmaze:100000"]),
    ("tmaze:1e3", ["'tmaze:1e3'"]), ("wind:strong", ["'wind:strong'; nearest: wind:"]),
    ("wind:?a=1", ["it takes none"]), ("cheetah:dir", ["nearest: cheetah:vel"])])
def test_mistakes_name_the_nearest_right_choice(name, fragments):
    with pytest.raises(ValueError) as error:
        make_env(name)
    message = str(error.value)
    assert "\n" not in message and all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize("absent, name, command", [
    ("mujoco", "cheetah:vel", 'pip install "gymnasium[mujoco]"'),
    ("metaworld", "metaworld:reach", "pip install metaworld==3.1.1")])
def test_absent_packages_name_their_command(monkeypatch, absent, name, command):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda module: None if module == absent else find(module))
    with pytest.raises(ModuleNotFoundError, match=re.escape(command) + "$"):
        make_env(name)
    assert not any(listed.startswith(name.partition(":")[0]) for listed, _ in envs.list_envs())
