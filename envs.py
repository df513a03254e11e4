"""Everything around the agent, without torch: every environment behind one interface, and the
files that a run leaves.

    from envs import make_env
    env = make_env("popgym:RepeatPrevious", seed=0)      # or "gym:CartPole-v1?horizon=200"
    observation, info = env.reset()                      # or "meta:gym:CartPole-v1?episodes=2"

`python envs.py` prints the table of all names, `python envs.py NAME` the card of one.

What an agent may rely on, whatever the name:

    observation   float32 (D,)                           one-hots, numbers, or both side by side
                  uint8 (H, W, C)                        a picture
                  {"vector": (D,), "image": (H, W, C)}   both
    action        Discrete(n), MultiDiscrete(nvec) counted from 0, or Box(-1, 1, (A,), float32)
    info          a fresh dict that never contains what the agent has to find out by itself
    env.name        canonical name: make_env(env.name) builds the same environment
    env.horizon     largest number of steps in one rollout
    env.references  {"random", "best", "paper"}: mean returns that are known, any of them may lack
    env.max_return  the return that a trained agent can reach (almost) surely, or None
    env.episode     plain data; reset(options={"episode": it}) begins the same episode again

Sections: 1 names and errors; 2 spaces; 3 the adapter; 4 popgym; 5 gymnasium; 6 meta; 7 many side by
side; 8 what an agent must know; 9 what a run leaves behind; 10 the list.
"""

import argparse
import contextlib
import csv
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import operator
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium import spaces
from tqdm import tqdm


# ---- 1. Names and errors --------------------------------------------------------------------
# A name is `suite:Name?key=value&key=value`. Every mistake in it ends in a one-line ValueError
# with the nearest valid choices, every absent package in a ModuleNotFoundError with its command.


class UsageError(ValueError):
    """The user asked for something that is not there; the message, one line, says what is."""


def make_env(name, seed=None, **options):
    """Build the environment `name`. Keyword options win over the ones written in the name.

    With a seed, the first plain `reset()` gives what `reset(seed=seed)` would give.
    """
    suite, rest, written = parse_name(name)
    env = SUITES[suite](rest, **{**written, **options})
    if seed is not None:
        gymnasium.Env.reset(env, seed=seed)  # seeds env.np_random and nothing else
        env.first_seed = seed
    return env


def parse_name(name):
    """'gym:CartPole-v1?horizon=50&a=true' -> ('gym', 'CartPole-v1', {'horizon': 50, 'a': True})"""
    if not isinstance(name, str):
        raise ValueError(f"an environment name is a string like 'gym:CartPole-v1', not {name!r}")
    full, _, query = name.partition("?")
    suite, colon, rest = full.partition(":")
    if not colon:
        choices = [*popgym_names(), *gym_names()]
        raise ValueError(f"environment {name!r} has no 'suite:' in front; {nearest(full, choices)}")
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r} in {name!r}; {nearest(suite, SUITES)}")
    options = {}
    for pair in query.split("&") if query else ():
        key, equals, value = pair.partition("=")
        if not equals or key in ("", "name", "seed", *options):  # make_env's own arguments, twice
            raise ValueError(f"bad option {pair!r} in {name!r}; write ?key=value&key=value, "
                             "every key once; the seed is an argument of its own")
        options[key] = parse_value(value)
    return suite, rest, options


def parse_value(text):
    """'3' -> 3, '0.5' -> 0.5, 'true' -> True, anything else stays a string."""
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def full_name(name, options):
    """The inverse of parse_name, options in alphabetical order."""
    written = sorted(f"{key}={str(value).lower() if isinstance(value, bool) else value}"
                     for key, value in options.items())
    return name + ("?" + "&".join(written) if written else "")


def nearest(wrong, choices):
    """'nearest: a, b, c', compared without regard to case."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(wrong.lower(), by_lower, n=3, cutoff=0.0)
    return "nearest: " + ", ".join(by_lower[lower] for lower in close)


def check_options(name, options, allowed):
    for key in options:
        if key not in allowed:
            hint = nearest(key, allowed) if allowed else "it takes none"
            raise ValueError(f"unknown option {key!r} for {name!r}; {hint}")


def positive_int(name, key, value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"option {key!r} of {name!r} must be a whole number >= 1, not {value!r}")
    return int(value)


# ---- 2. Spaces ------------------------------------------------------------------------------
# Observations become one float32 vector, equal number by number to gymnasium's `flatten` but
# several times faster, because tables are made once and the kind of space is asked once.
# The functions live at module level and are bound with `partial`, so environments can be pickled.


def observation_encoder(space):
    """Uniform observation space, and the function from a raw observation into it."""
    parts = [(path, part, part_encoder(part)) for path, part in leaves(space)]
    images = [(path, part) for path, part, _ in parts if is_image(part)]
    vectors = [(path, encode) for path, part, encode in parts if not is_image(part)]
    if len(images) > 1 or not parts:
        raise ValueError(f"observations of {len(images)} pictures in {len(parts)} parts are not "
                         "supported; supported: at most one picture")
    if vectors:
        flat = [spaces.utils.flatten_space(part) for _, part, _ in parts if not is_image(part)]
        with np.errstate(over="ignore"):  # a float64 bound beyond float32 rightly becomes inf
            low = np.concatenate([box.low for box in flat]).astype(np.float32)
            high = np.concatenate([box.high for box in flat]).astype(np.float32)
        box = spaces.Box(low, high, dtype=np.float32)
    if parts[0][0] == ():  # not nested at all
        return images[0][1] if images else box, parts[0][2]
    if not images:
        return box, functools.partial(encode_parts, vectors)
    (path, image), = images
    uniform = spaces.Dict({"image": image, **({"vector": box} if vectors else {})})
    return uniform, functools.partial(encode_with_image, path, vectors)


def leaves(space, path=()):
    """Yield (path of keys, simple space) of nested Dict and Tuple spaces, in flatten's order."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        inside = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        for key, part in inside:
            yield from leaves(part, path + (key,))
    else:
        yield path, space


def is_image(space):
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def part_encoder(space):
    if is_image(space):
        return np.array  # a copy
    if isinstance(space, spaces.Discrete):
        rows = list(np.eye(space.n, dtype=np.float32))  # a list: indexing an array costs 3x more
        return functools.partial(one_hot, rows, int(space.start))
    if isinstance(space, spaces.MultiDiscrete):
        sizes = space.nvec.ravel()
        offsets = np.cumsum(sizes) - sizes - space.start.ravel()
        return functools.partial(many_one_hots, offsets, int(sizes.sum()))
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return plain_numbers
    raise ValueError(f"observations of type {type(space).__name__} are not supported; supported: "
                     "Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple of these")


def one_hot(rows, start, value):
    return rows[value - start].copy()  # a copy, so that nobody can spoil the table


def many_one_hots(offsets, size, value):
    out = np.zeros(size, dtype=np.float32)
    out[np.ravel(value) + offsets] = 1.0
    return out


def plain_numbers(value):
    return np.array(value, dtype=np.float32).ravel()


def encode_parts(parts, value):
    return np.concatenate([encode(functools.reduce(operator.getitem, path, value))
                           for path, encode in parts])


def encode_with_image(image_path, parts, value):
    image = np.array(functools.reduce(operator.getitem, image_path, value))
    return {"image": image, **({"vector": encode_parts(parts, value)} if parts else {})}


def action_decoder(space):
    """Uniform action space, and the function from an action in it to what the raw env wants."""
    if isinstance(space, spaces.Discrete):
        # To plain ints, because some popgym classes reject everything else. A dict, because a list
        # would silently take -1 for the last action.
        table = {i: int(space.start) + i for i in range(space.n)}
        return spaces.Discrete(space.n), functools.partial(decode_discrete, table)
    if isinstance(space, spaces.MultiDiscrete):
        uniform = spaces.MultiDiscrete(space.nvec.ravel())
        return uniform, functools.partial(decode_many, space.start)
    floats = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
    if not floats or len(space.shape) != 1 or not space.is_bounded():
        raise ValueError(f"actions of type {type(space).__name__}{space.shape} are not supported; "
                         "supported: Discrete, MultiDiscrete, 1-D float Box with finite bounds")
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    uniform = spaces.Box(-1.0, 1.0, space.shape, np.float32)
    return uniform, functools.partial(decode_box, low, high, space.dtype)


def decode_discrete(table, action):
    return table[action.item() if isinstance(action, np.ndarray) else action]


def decode_many(start, action):
    return np.asarray(action, dtype=np.int64).reshape(start.shape) + start


def decode_box(low, high, dtype, action):
    # the two-sided form hits both bounds exactly; low + part * (high - low) may miss one by an ulp
    part = np.minimum(np.maximum(np.asarray(action, dtype=np.float64), -1.0), 1.0) * 0.5 + 0.5
    return (low * (1.0 - part) + high * part).astype(dtype)


# ---- 3. The adapter -------------------------------------------------------------------------


class Adapter(gymnasium.Env):
    """One thin layer around a raw environment: uniform spaces, clean info, optional time limit.

    `limit`: truncate after so many steps; None leaves the end of a rollout to the raw env.
    """

    first_seed = None  # set by make_env, used up by the first reset

    def __init__(self, inner, name, horizon, limit=None, references=None, max_return=None):
        self.inner, self.name, self.horizon = inner, name, horizon
        self.references, self.max_return = dict(references or {}), max_return
        self.observation_space, self._encode = observation_encoder(inner.observation_space)
        self.action_space, self._decode = action_decoder(inner.action_space)
        self.metadata, self.render_mode = inner.metadata, inner.render_mode
        self._limit = float("inf") if limit is None else limit
        self._steps_left = self._limit

    def reset(self, *, seed=None, options=None):
        if seed is None:
            seed = self.first_seed
        self.first_seed = None
        super().reset(seed=seed)
        self._steps_left = self._limit
        options = dict(options or {})
        # Every episode has a seed of its own, so that any one of them can be played again.
        self.episode = options.pop("episode", seed)
        if self.episode is None:
            self.episode = int(self.np_random.integers(2**31))
        observation, info = self.reset_inner(self.episode, options or None)
        return self._encode(observation), public_info(info)

    def reset_inner(self, seed, options):
        return self.inner.reset(seed=seed, options=options)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.inner.step(self._decode(action))
        self._steps_left -= 1
        truncated = bool(truncated) or self._steps_left <= 0
        return (self._encode(observation), float(reward), bool(terminated), truncated,
                public_info(info))

    def render(self):
        return self.inner.render()

    def close(self):
        self.inner.close()


def public_info(info):
    """Only success is passed on: popgym's info holds card counts and bandit probabilities."""
    for key in ("success", "is_success"):
        if key in info:
            return {"success": float(info[key])}
    return {}


# ---- 4. popgym ------------------------------------------------------------------------------
# Memory problems in three difficulties. Random: mean return of the uniform policy. Best: what
# playing perfectly from the observations reaches on average, where that is known; for the bandit
# an upper bound, the best arm pulled from the first step. Paper: maximum of AMAGO's mean learning
# curve within 15M steps, read off the figures of the paper, which used an older popgym whose
# CountRecall and MineSweeper differ a little.

DIFFICULTIES = ("Easy", "Medium", "Hard")
ONES, UNKNOWN = (1.0, 1.0, 1.0), (None, None, None)
POPGYM = {  # family: (horizon, random, best, paper) for Easy, Medium, Hard; then the explanation
    "Autoencode": ((103, 207, 311), (-.497, -.498, -.498), ONES, (.995, .992, .597),
                   "watch cards, then name their suits in reverse order"),
    "Battleship": ((64, 100, 144), (-.445, -.419, -.396), UNKNOWN, (.182, -.252, -.400),
                   "sink hidden ships, seeing only hit or miss"),
    "Concentration": ((104, 208, 104), (-.188, -.182, -.831), (.83, .82, .70),
                      (.310, -.128, -.833), "turn over matching pairs of cards"),
    "CountRecall": ((51, 103, 207), (-.927, -.927, -.882), ONES, (.918, .899, .690),
                    "say how often the asked card has been dealt so far"),
    "HigherLower": ((51, 103, 155), (.000, -.008, -.001), (.56, .51, .51), (.517, .505, .504),
                    "guess whether the next card is higher, counting cards"),
    "LabyrinthEscape": ((1023,) * 3, (-.253, -.864, -.922), UNKNOWN, UNKNOWN,
                        "find the exit of a maze, seeing 3x3 cells"),
    "LabyrinthExplore": ((1023,) * 3, (-.308, -.650, -.714), UNKNOWN, UNKNOWN,
                         "visit every cell of a maze, seeing 3x3 cells"),
    "MineSweeper": ((14, 30, 54), (-.238, -.403, -.432), UNKNOWN, (.740, .009, -.290),
                    "uncover squares without mines from neighbour counts"),
    "MultiarmedBandit": ((200, 400, 600), (.002, .016, -.003), (.79, .91, .94),
                         (.668, .735, .746), "find the best of 10, 20, 30 slot machines"),
    "NoisyPositionOnlyCartPole": ((200,) * 3, (.112, .112, .111), UNKNOWN, (.986, .608, .360),
                                  "balance a pole from noisy positions without velocities"),
    "NoisyPositionOnlyPendulum": ((200,) * 3, (.243, .245, .236), UNKNOWN, (.904, .908, .902),
                                  "swing up a pendulum from noisy angles without velocities"),
    "PositionOnlyCartPole": ((200, 400, 600), (.112, .056, .037), ONES, (.998, .999, 1.000),
                             "balance a pole from positions without velocities"),
    "PositionOnlyPendulum": ((200, 150, 100), (.249, .237, .235), UNKNOWN, (.912, .881, .824),
                             "swing up a pendulum from angles without velocities"),
    "RepeatFirst": ((51, 415, 831), (-.495, -.492, -.497), ONES, (.994, .995, .997),
                    "keep naming the suit of the very first card"),
    "RepeatPrevious": ((51, 103, 155), (-.503, -.503, -.501), ONES, (.997, .994, .994),
                       "name the suit seen 3, 31, 63 cards before the current one"),
    # popgym's first observation here is, by a slip of its own, the position
    "VelocityOnlyCartPole": ((200, 400, 600), (.112, .056, .037), ONES, UNKNOWN,
                             "balance a pole from velocities without positions"),
}
# Families where a trained agent can be expected at the maximum, so that training may stop there.
SOLVABLE = ("Autoencode", "CountRecall", "RepeatFirst", "RepeatPrevious", "PositionOnlyCartPole",
            "VelocityOnlyCartPole")


def popgym_env(name, **options):
    family, difficulty = split_difficulty(name)
    if family not in POPGYM:
        # with the family right, it is the difficulty that is wrong
        endings = DIFFICULTIES if name.startswith(tuple(POPGYM)) else [difficulty]
        known = [f"popgym:{other}{ending}" for other in POPGYM for ending in endings]
        raise ValueError(f"unknown environment {'popgym:' + name!r}; "
                         + nearest("popgym:" + name, known))
    difficulty = difficulty or "Easy"
    name = f"popgym:{family}{difficulty}"
    check_options(name, options, ())
    need("popgym", "popgym==1.0.7", name)
    is_maze = family.startswith("Labyrinth")
    if is_maze:
        need("mazelib", "mazelib==0.9.16", name)
    with warnings.catch_warnings():
        # popgym advises against its mazes as a test of memory, in every constructor
        warnings.filterwarnings("ignore", "Maze environments", DeprecationWarning)
        inner = getattr(importlib.import_module("popgym.envs"), family + difficulty)()
    horizon, *returns = (column[DIFFICULTIES.index(difficulty)] for column in POPGYM[family][:4])
    known = {key: value for key, value in zip(("random", "best", "paper"), returns)
             if value is not None}
    return (Labyrinth if is_maze else Adapter)(
        inner, name, horizon, references=known, max_return=1.0 if family in SOLVABLE else None)


def split_difficulty(name):
    """'RepeatFirstHard' -> ('RepeatFirst', 'Hard'), 'RepeatFirst' -> ('RepeatFirst', '')"""
    difficulty = next((word for word in DIFFICULTIES if name.endswith(word)), "")
    return name.removesuffix(difficulty), difficulty


def need(module, requirement, name):
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{name!r} needs {module}: pip install {requirement}")


def popgym_names():
    if importlib.util.find_spec("popgym") is None:
        return []
    mazes = importlib.util.find_spec("mazelib") is not None
    return [f"popgym:{family}{difficulty}" for family in POPGYM for difficulty in DIFFICULTIES
            if mazes or not family.startswith("Labyrinth")]


class Labyrinth(Adapter):
    """popgym's mazes are drawn from, and seed, the process-wide generators. Not here:

    every reset seeds them with the episode's seed, and puts them back as they were. Steps draw
    nothing.
    """

    def reset_inner(self, seed, options):
        outside = random.getstate(), np.random.get_state()
        try:
            return self.inner.reset(seed=seed, options=options)
        finally:
            random.setstate(outside[0])
            np.random.set_state(outside[1])


# ---- 5. gymnasium ---------------------------------------------------------------------------

DEFAULT_HORIZON = 1000  # for ids that are registered without a time limit


def gym_env(name, **options):
    """Any gymnasium id. `horizon` is ours, all other options go to the environment itself."""
    spec = gym_spec(name)
    full = full_name("gym:" + name, options)
    horizon = positive_int(full, "horizon", options.pop(
        "horizon", spec.max_episode_steps or DEFAULT_HORIZON))
    try:
        # no TimeLimit and no checker around it: the adapter counts the steps itself
        inner = gymnasium.make(spec, max_episode_steps=-1, disable_env_checker=True, **options)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise ModuleNotFoundError(f"gym:{name} needs a package: {pip_command(error)}") from error
    except Exception as error:
        if not options:
            raise  # the environment's own bug, shown as it is
        if "unexpected keyword" in str(error):
            make = spec.entry_point
            make = make if callable(make) else gymnasium.envs.registration.load_env_creator(make)
            check_options(full, options, ["horizon", *inspect.signature(make).parameters])
        raise ValueError(f"{full!r} cannot be built: {error!r}") from error
    return Adapter(inner, full, horizon, limit=horizon)


def gym_spec(name):
    """`module:Id` imports the module first, which is how other packages add their ids."""
    module, colon, name_there = name.rpartition(":")
    if colon and module.isidentifier():
        need(module, module, f"gym:{name}")
        importlib.import_module(module)
    if name_there not in gymnasium.registry or (colon and not module.isidentifier()):
        raise ValueError(f"unknown environment {'gym:' + name!r}; "
                         + nearest("gym:" + name_there, gym_names()))
    return gymnasium.registry[name_there]


def gym_names():
    return ["gym:" + name for name in gymnasium.registry]


def pip_command(error):
    """The command in gymnasium's own message, or one made from the name of the module."""
    command = re.findall(r"`(pip install [^`]+)`", str(error))
    if command:
        return command[-1]
    if "gymnasium-robotics" in str(error):  # where mujoco v2 and v3 moved
        return "pip install gymnasium-robotics"
    module = getattr(error, "name", None) or '"gymnasium[all]"'
    return "pip install " + {"jax": '"gymnasium[jax]"'}.get(module, module)


# ---- 6. meta --------------------------------------------------------------------------------


def meta_env(name, **options):
    """`meta:<name>?episodes=k`; <name> is any other name, a bare id means gym."""
    episodes = positive_int("meta:" + name, "episodes", options.pop("episodes", 2))
    inner_name = name if ":" in name else "gym:" + name
    if inner_name.startswith("meta:"):
        raise ValueError(f"'meta:{name}' puts meta inside meta; nearest: {name}")
    return Meta(make_env(inner_name, **options), episodes)


class Meta(gymnasium.Env):
    """k episodes of one sampled task glued into one rollout (RL^2, after Duan et al. 2016).

    The task is a seed drawn at reset; every inner episode starts from that seed, so the deck, the
    bandit arms, the maze are the same k times, and what was learnt in one episode pays in the next.

        inner step     last of episode 1            last of episode k
        observation    first of episode 2           the terminal one
        info           reset=True, episode_return   episode_return
        ends           no                           as the inner env says
    """

    def __init__(self, inner, episodes):
        self.inner, self.episodes = inner, episodes
        name, _, query = inner.name.partition("?")
        query = "&".join(sorted([f"episodes={episodes}", *filter(None, [query])]))
        self.name = f"meta:{name}?{query}"
        self.horizon = episodes * inner.horizon
        self.observation_space, self.action_space = inner.observation_space, inner.action_space
        self.metadata, self.render_mode = inner.metadata, inner.render_mode
        self.max_return = None if inner.max_return is None else episodes * inner.max_return
        # what is best in one episode says little about k of them, unless it is the maximum
        self.references = {} if self.max_return is None else {"best": self.max_return}
        if "random" in inner.references:
            self.references["random"] = episodes * inner.references["random"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = dict(options or {})
        self.episode = options.pop("episode", None)          # the task's seed
        if self.episode is None:
            self.episode = int(self.np_random.integers(2**31))
        self._number, self._return = 1, 0.0
        return self.inner.reset(seed=self.episode, options=options or None)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.inner.step(action)
        self._return += reward
        if terminated or truncated:
            info["episode_return"] = self._return
            if self._number < self.episodes:
                self._number, self._return = self._number + 1, 0.0
                # the first observation takes the place of the terminal one, which leads nowhere
                observation, _ = self.inner.reset(seed=self.episode)
                terminated = truncated = False
                info["reset"] = True
        return observation, reward, terminated, truncated, info

    def render(self):
        return self.inner.render()

    def close(self):
        self.inner.close()


# ---- 7. Many environments side by side ------------------------------------------------------


class BrokenEnvironment(RuntimeError):
    """An environment broke its own contract; the message names environment, step and key."""


class Shard:
    """Environments that step one after the other in one process, every observation checked."""

    def __init__(self, name, seeds, first=0):
        self.name, self.first = name, first
        self.envs = [make_env(name, seed=seed) for seed in seeds]
        self.time = [0] * len(self.envs)

    def begin(self, i, options=None):
        """Reset environment i -> (first observation, env.episode)"""
        observation, _ = self.envs[i].reset(options=options)
        self.time[i] = 0
        self.check(i, observation)
        return observation, self.envs[i].episode

    def begin_all(self, _=None):
        return [self.begin(i) for i in range(len(self.envs))]

    def step(self, actions):
        """-> per environment (observation, reward, terminated, truncated, info, what begin gave if
        the episode ended, else None)"""
        results = []
        for i, (env, action) in enumerate(zip(self.envs, actions)):
            observation, reward, terminated, truncated, info = env.step(action)
            self.time[i] += 1
            self.check(i, observation)
            if not np.isfinite(reward):
                raise self.broken(i, f"the reward is {reward}")
            ended = terminated or truncated
            if not ended and self.time[i] >= env.horizon:
                raise self.broken(i, f"the episode goes on beyond its horizon of {env.horizon}")
            results.append((observation, reward, terminated, truncated, info,
                            self.begin(i) if ended else None))
        return results

    def state(self, _=None):
        """-> per environment (episode, state of the generator that draws the next episodes)"""
        return [(env.episode, env.np_random.bit_generator.state) for env in self.envs]

    def restore(self, states):
        """states: per environment what `state` gave, and the actions since the episode began."""
        for i, (episode, generator, actions) in enumerate(states):
            self.begin(i, {"episode": episode})
            for action in actions:
                self.envs[i].step(action)
            self.time[i] = len(actions)
            self.envs[i].np_random.bit_generator.state = generator

    def check(self, i, observation):
        space = self.envs[i].observation_space
        if not isinstance(space, spaces.Dict):
            name = "image" if is_image(space) else "vector"
            space, observation = {name: space}, {name: observation}
        elif not isinstance(observation, dict) or set(observation) != set(space):
            raise self.broken(i, f"the observation is not a dict of {', '.join(space)}")
        for part, box in space.items():
            x = observation[part]
            if getattr(x, "shape", None) != box.shape:
                raise self.broken(i, f"observation {part!r} has shape {np.shape(x)}, not"
                                     f" {box.shape}")
            if x.dtype.kind == "f" and not np.isfinite(x).all():
                raise self.broken(i, f"observation {part!r} holds NaN or inf: {x}")

    def broken(self, i, what):
        return BrokenEnvironment(f"{self.name}: at step {self.time[i]} of environment"
                                 f" {self.first + i}, {what}")


class ParallelEnvs:
    """N environments side by side: in this process, or spread over `workers` processes.

    `send` starts a step, `receive` waits for it: between the two, workers step while the caller
    does something else. The results are the same with any number of workers; they pay where a step
    costs more than the trip to another process and back, about 0.1 ms.
    """

    def __init__(self, name, seeds, workers=0):
        self.closed = False
        parts = np.array_split(np.arange(len(seeds)), max(1, min(workers, len(seeds))))
        self.parts = [slice(part[0], part[-1] + 1) for part in parts]
        arguments = [(name, [int(seed) for seed in seeds[part]], part.start)
                     for part in self.parts]
        if not workers:
            self.shard, self.sent = Shard(*arguments[0]), None
            self.pipes = []
            return
        context = multiprocessing.get_context("spawn")    # a fork would copy torch's threads
        self.pipes, self.processes = [], []
        for argument in arguments:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, *argument), daemon=True)
            process.start()
            theirs.close()                                # so that the pipe ends with the worker
            self.pipes.append(ours)
            self.processes.append(process)

    def send(self, command, arguments=None):
        """Start a Shard's `command`; arguments: one per environment, or None."""
        self.sent = command, arguments
        for pipe, part in zip(self.pipes, self.parts):
            pipe.send((command, None if arguments is None else arguments[part]))

    def receive(self):
        """-> what the command gave, a list with one entry per environment"""
        if not self.pipes:
            command, arguments = self.sent
            return getattr(self.shard, command)(arguments)
        results = []
        for pipe in self.pipes:
            try:
                result = pipe.recv()
            except EOFError:
                raise BrokenEnvironment("a worker process that steps environments died") from None
            if isinstance(result, Exception):
                raise result
            results += result or ()
        return results

    def call(self, command, arguments=None):
        self.send(command, arguments)
        return self.receive()

    def close(self):
        """End the workers; also called when this object or this process goes away."""
        for pipe in self.pipes:
            pipe.close()
        self.pipes = []


def serve(pipe, *arguments):
    """A worker's life: one Shard, commands in, results out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # Ctrl-C is the parent's to handle
    shard = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            command, argument = pipe.recv()
            try:
                shard = shard or Shard(*arguments)
                pipe.send(getattr(shard, command)(argument))
            except Exception as problem:
                pipe.send(problem)


# ---- 8. What an agent must know of an environment --------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spec:
    """What an agent must know of its environment: plain numbers, stored with every checkpoint."""
    vector: int = 0             # length of the observation vector, 0 if there is none
    image: tuple = ()           # (height, width, channels) of the picture, () if there is none
    texture: tuple = ()         # (cells of a map, ids), () if there is none
    instruction: tuple = ()     # (K, words per slot, vocabulary), () if there is none
    achieved: tuple = ()        # (M, W): at most M goals of W words are reached by one step
    discrete: bool = True
    actions: int = 1            # A: number of actions, or dimensions of a continuous one
    nvec: tuple = ()            # a MultiDiscrete action's factors; A is their product
    horizon: int = 1            # longest possible rollout

    @staticmethod
    def of(env):
        """Read the spec off a gymnasium.Env made by envs.make_env."""
        space = env.observation_space
        if not isinstance(space, gymnasium.spaces.Dict):
            space = {"image" if len(space.shape) == 3 else "vector": space}
        parts = {name: box.shape for name, box in space.items()}
        if "vector" in parts:
            parts["vector"], = parts["vector"]
        for name in {"texture", "instruction"} & set(parts):
            parts[name] += (int(space[name].high.max()) + 1,)
        if "instruction" in parts:
            parts["achieved"] = (env.max_achieved, parts["instruction"][1] - 1)
        action = env.action_space
        if isinstance(action, gymnasium.spaces.Discrete):
            parts.update(actions=int(action.n))
        elif isinstance(action, gymnasium.spaces.MultiDiscrete):
            nvec = tuple(int(n) for n in action.nvec)
            parts.update(actions=math.prod(nvec), nvec=nvec)
        else:
            parts.update(discrete=False, actions=action.shape[0])
        return Spec(horizon=int(env.horizon), **parts)

    def to_env(self, action):
        """The agent's actions (N,) or (N, A) as a list of what each environment's step takes."""
        if not self.discrete:
            return list(action)
        if self.nvec:
            return list(np.stack(np.unravel_index(action, self.nvec), -1))
        return action.tolist()


# ---- 9. What a run leaves behind: log.csv, curve.png, eval.json, config.json -----------------

# Column of log.csv -> (title, width, format in the console's table, meaning).
COLUMNS = {
    "env_steps": ("env steps", 11, ",.0f", "environment steps so far"),
    "updates": ("updates", 9, ",.0f", "gradient updates so far"),
    "seconds": ("seconds", 9, ".1f", "training time: acting and learning, without evaluations"),
    "return_mean": ("return", 9, ".3f", "mean return of the evaluation's episodes"),
    "return_std": ("+-", 7, ".3f", "their standard deviation"),
    "success": ("success", 9, ".2f", "share that the environment calls a success, if it does"),
    "train_return": ("train", 8, ".3f", "mean return of the rollouts since the last row (noisy)"),
    "critic_loss": ("critic", 8, ".3f", "mean squared TD error, in PopArt's units"),
    "actor_loss": ("actor", 8, ".3f", "minus the lowest critic's value of the policy, same units"),
    "bc_loss": ("bc", 7, ".3f", "filtered behaviour cloning loss"),
    "filter": ("filter", 7, ".2f", "share of replayed actions that the critics prefer to pi"),
    "value": ("value", 8, ".3f", "mean TD target of the acting gamma, in units of reward"),
    "grad_norm": ("grad", 7, ".1f", "norm of the gradient before clipping"),
    "acts_per_s": ("acts/s", 8, ",.0f", "environment steps per second spent acting"),
    "updates_per_s": ("updates/s", 11, ".1f", "updates per second spent learning"),
}


class Log:
    """The files of one run, and the table on the console. Nothing is written before it is made."""

    def __init__(self, config, env, agent, goal, writes=True):
        """agent: a line on it for the console; goal: the return that ends the run; writes: False
        in all but the first of several processes."""
        self.config, self.env, self.writes = config, env, writes
        self.rows, self.next_eval = [], 0
        self.returns, self.sums, self.count = [], {}, 0       # since the last row
        self.clock = dict(acting=0.0, learning=0.0)           # seconds since the run began
        self.saved_at = time.monotonic()
        self.folder = Path(config.resume) if config.resume else output_folder(config)
        known = ", ".join(f"{name} {value:g}" for name, value in env.references.items()) or "?"
        until = f"return {goal:g} or " if goal < math.inf else ""
        self.header = (
            f"{env.name}: rollouts of at most {env.horizon} steps; mean return {known}\n"
            f"{agent}; until {until}{config.env_steps:,} env steps\n\n"
            + "".join(f"{title:>{width}}" for title, width, _, _ in COLUMNS.values()))
        self.bar = tqdm(total=config.env_steps, unit=" steps", leave=False, dynamic_ncols=True,
                        disable=None if self.writes else True)

    @contextlib.contextmanager
    def files(self, save):
        """Write everything that a run leaves, however the `with` block ends; save() is called
        before the last files."""
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            versions = {name: importlib.metadata.version(name)
                        for name in ("torch", "numpy", "gymnasium")}
            versions["python"] = sys.version.split()[0]
            git = subprocess.run("git describe --always --dirty --abbrev=40", shell=True, text=True,
                                 capture_output=True, cwd=Path(__file__).resolve().parent)
            self.json("config.json", dict(dataclasses.asdict(self.config), versions=versions,
                                          commit=git.stdout.strip(), command=" ".join(sys.argv)))
            self.csv()
            tqdm.write(self.header)
        try:
            yield
        finally:
            self.bar.close()
            save()
            if self.rows and self.writes:
                self.finish()

    def progress(self, env_steps):
        self.bar.update(env_steps - self.bar.n)

    def checkpoint_due(self):
        return time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes

    @contextlib.contextmanager
    def timer(self, what):
        """Adds the seconds spent inside the `with` block to what = acting or learning."""
        start = time.perf_counter()
        yield
        self.clock[what] += time.perf_counter() - start

    def add(self, info):
        """Take in one update's dict of scalar tensors, which stay on their device until the next
        row: reading them here would make a GPU wait."""
        self.sums = {name: x + self.sums.get(name, 0.0) for name, x in info.items()}
        self.count += 1

    def row(self, score, env_steps, updates):
        """One evaluation: a row of log.csv and of the console's table."""
        last = self.rows[-1] if self.rows else dict(self.clock, env_steps=0, updates=0)
        if env_steps >= self.next_eval:
            self.next_eval = env_steps + max(self.config.eval_every, env_steps // 10)
        elif env_steps == last["env_steps"]:                  # a finished run was resumed
            return
        row = dict(score, **self.clock, env_steps=env_steps, updates=updates,
                   seconds=sum(self.clock.values()),
                   train_return=float(np.mean(self.returns)) if self.returns else math.nan)
        row.update({name: x.item() / self.count for name, x in self.sums.items()})
        for name, count, clock in (("acts_per_s", "env_steps", "acting"),
                                   ("updates_per_s", "updates", "learning")):
            seconds = row[clock] - last[clock]
            row[name] = (row[count] - last[count]) / seconds if seconds else math.nan
        self.rows.append(row)
        self.returns, self.sums, self.count = [], {}, 0
        if self.writes:
            with report_disk_trouble():
                self.csv()
            cells = ((row.get(name, math.nan), how, width) for name, (_, width, how, _)
                     in COLUMNS.items())
            tqdm.write("".join(("-" if math.isnan(x) else format(x, how)).rjust(width)
                               for x, how, width in cells))

    def finish(self):
        """eval.json and curve.png from the rows so far, and a last line that says where."""
        last = dict(self.rows[-1], env=self.env.name, seed=self.config.seed)
        last["train_seconds"] = last["seconds"]
        if math.isnan(last["success"]):
            last["success"] = None
        self.json("eval.json", {name: last[name] for name in (
            "env", "return_mean", "return_std", "success", "episodes", "env_steps", "updates",
            "train_seconds", "seed")})
        plot_curve(self.rows, self.env, self.folder / "curve.png")
        tqdm.write(f"\nreturn {last['return_mean']:.3f} +- {last['return_std']:.3f} over"
                   f" {last['episodes']} episodes after {last['env_steps']:,} env steps,"
                   f" {last['updates']:,} updates, {last['seconds']:.1f} s of training\n"
                   f"{self.folder}/: log.csv curve.png eval.json config.json checkpoint.pt")

    def csv(self):
        with open(self.folder / "log.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for row in self.rows:
                values = (row.get(name, math.nan) for name in COLUMNS)
                writer.writerow("" if math.isnan(x) else f"{x:.8g}" for x in values)

    def json(self, name, content):
        (self.folder / name).write_text(json.dumps(content, indent=1) + "\n")

    def state(self):
        return dict(rows=self.rows, next_eval=self.next_eval, clock=self.clock, sums=self.sums,
                    returns=self.returns, count=self.count)

    def restore(self, state):
        vars(self).update(state)


def output_folder(config):
    """--out, or the first free one of runs/<env>-<seed>, runs/<env>-<seed>-2, ...

    Raises UsageError if --out holds a run already: nobody's run is ever overwritten.
    """
    out = Path(config.out)
    if config.out and (out / "log.csv").exists():
        raise UsageError(f"--out {out} already holds a run; choose another folder")
    if not next(path for path in (out, *out.parents) if path.exists()).is_dir():
        raise UsageError(f"--out {out} cannot be a folder: there is a file in its place")
    stem = f"runs/{re.sub('[^A-Za-z0-9.]+', '-', config.env)}-{config.seed}"
    names = (Path(stem if i == 1 else f"{stem}-{i}") for i in itertools.count(1))
    return out if config.out else next(name for name in names if not name.exists())


def plot_curve(rows, env, path):
    """Return against env steps, one standard deviation shaded, with the known references."""
    from matplotlib.figure import Figure       # here: half a second that --help need not wait for
    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    x, mean, std = (np.array([row[name] for row in rows])
                    for name in ("env_steps", "return_mean", "return_std"))
    axes.plot(x, mean, "o-", ms=3, label="mean of an evaluation, +- one standard deviation")
    axes.fill_between(x, mean - std, mean + std, alpha=0.2, lw=0)
    labels = dict(random="random policy", best="best possible", paper="AMAGO paper")
    for (name, y), style in zip(env.references.items(), (":", "--", "-.")):
        axes.axhline(y, ls=style, color="0.3", lw=1.2, label=f"{labels[name]}: {y:g}")
    axes.set(xlabel="environment steps", ylabel="return per episode", title=env.name)
    axes.legend(fontsize=8)
    figure.savefig(path)


@contextlib.contextmanager
def catch_signals():
    """Inside this `with` block Ctrl-C and SIGTERM only set an event, so that a run ends between two
    steps, with everything consistent. A second one interrupts at once."""
    caught = threading.Event()

    def handler(number, frame):
        if caught.is_set():
            raise KeyboardInterrupt
        caught.set()
    main = threading.current_thread() is threading.main_thread()     # only it gets signals
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield caught
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextlib.contextmanager
def report_disk_trouble():
    """What cannot be written is said, and training goes on."""
    try:
        yield
    except OSError as problem:
        tqdm.write(f"not written: {problem}; training goes on, the last checkpoint is intact")


# ---- 10. The list ---------------------------------------------------------------------------

# A new suite is one more function (name, **options) -> gymnasium.Env in this table.
SUITES = {"popgym": popgym_env, "gym": gym_env, "meta": meta_env}


def list_envs():
    """Yield (name, explanation) for everything that can be built here and now."""
    for name in popgym_names():
        yield name, POPGYM[split_difficulty(name.removeprefix("popgym:"))[0]][-1]
    yield "gym:CartPole-v1", "any gymnasium id; ?horizon=n and the environment's own options"
    yield "meta:gym:CartPole-v1?episodes=2", "k episodes of one task in one rollout, any name"


def describe(name):
    """One row of the table, as {column: text}."""
    env = make_env(name)
    known = {key: f"{value:.3f}" for key, value in env.references.items()}
    return {"name": env.name, "observation": space_text(env.observation_space),
            "action": space_text(env.action_space), "horizon": str(env.horizon),
            **{key: known.get(key, "-") for key in ("random", "best", "paper")}}


def space_text(space):
    if isinstance(space, spaces.Dict):
        return " + ".join(map(space_text, space.values()))
    if isinstance(space, spaces.Box):
        return ("image " if is_image(space) else "vector ") + "x".join(map(str, space.shape))
    sizes = [space.n] if isinstance(space, spaces.Discrete) else space.nvec
    return "one of " + "x".join(map(str, sizes))


def main(arguments=None):
    parser = argparse.ArgumentParser(description="The table of all environments, or one's card.")
    parser.add_argument("name", nargs="?", help="for example popgym:RepeatPrevious")
    name = parser.parse_args(arguments).name
    try:
        rows = [describe(each) for each in ([name] if name else dict(list_envs()))]
    except (ValueError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    if name:
        about = dict(list_envs()).get(rows[0]["name"])
        for key, text in {**rows[0], **({"about": about} if about else {})}.items():
            print(f"{key:13}{text}")
        return 0
    rows.insert(0, {column: column for column in rows[0]})
    widths = {column: max(len(row[column]) for row in rows) for column in rows[0]}
    for row in rows:  # words to the left, numbers to the right
        words = ("name", "observation", "action")
        print(*(text.ljust(widths[column]) if column in words else text.rjust(widths[column])
                for column, text in row.items()), sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
