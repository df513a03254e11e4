"""Everything around the agent, without torch: every environment behind one interface, and the
files that a run leaves.

    from envs import make_env
    env = make_env("popgym:RepeatPrevious", seed=0)      # or "gym:CartPole-v1?horizon=200"
    observation, info = env.reset()                      # or "meta:gym:CartPole-v1?episodes=2"

`python envs.py` prints the table of all names, `python envs.py NAME` the card of one, and
`python envs.py "maze:15x15" --play` lets you play it.

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
    env.needs       what it takes that plain RL lacks: "memory, adaptation, instructions" or some
    env.episode     plain data; reset(options={"episode": it}) begins the same episode again

With instructions, observations are {"vector": (D,), "instruction": int32 (K, 1 + W)}: Instructed.
Crafter has "texture": uint8 (64,) too, tiles by number, up to the space's high.

Sections: 1 names and errors; 2 spaces; 3 the adapter; 4 popgym; 5 gymnasium; 6 meta; 7 own worlds
and instructions; 8 memory and meta-RL worlds; 9 instruction worlds; 10 pictures; 11 crafter;
12 many side by side; 13 what an agent must know; 14 what a run leaves behind; 15 a command line;
16 the list.
"""

import argparse
import collections
import contextlib
import csv
import ctypes
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
import numbers
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import types
import warnings
import weakref
import zipfile
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium import spaces
from tqdm import tqdm

# Threads that share a product wait for each other in a loop before they sleep; GNU's OpenMP 300 000
# times, some 15 ms. On a busy machine a loop keeps the core from the very thread that it waits for:
# on two cores beside one busy process the main command then made .2 updates/s, with 20 000 times
# 4; alone 24.1 and 23.0. It is read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


# ---- 1. Names and errors --------------------------------------------------------------------
# A name is `suite:Name?key=value&key=value`. Every mistake in it ends in a one-line ValueError
# with the nearest valid choices, every absent package in a ModuleNotFoundError with its command.


class UsageError(ValueError):
    """The user asked for something that is not there; the message, one line, says what is."""


class MachineError(UsageError):
    """This machine lacks it. Of several processes, each says so: others may have it."""


def make_env(name, seed=None, **options):
    """Build the environment `name`. Keyword options win over the ones written in the name.

    With a seed, the first plain `reset()` gives what `reset(seed=seed)` would give.
    """
    try:
        suite, rest, written = parse_name(name)
        env = SUITES[suite](rest, **{**written, **options})
    except ValueError as problem:
        raise UsageError(" ".join(str(problem).split())) from problem
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
        choices = [*dict(list_envs()), *gym_names()]
        if full in SUITES:
            choices = [x for x in choices if x.startswith(full + ":")] or [full + ":"]
        raise ValueError(f"environment {name!r} has no 'suite:' in front; {nearest(full, choices)}")
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r} in {name!r}; {nearest(suite, SUITES)}")
    options = {}
    for pair in query.split("&") if query else ():
        key, equals, value = pair.partition("=")
        if not equals or key in ("", "name", "seed", *options):  # make_env's own arguments, twice
            raise ValueError(f"bad option {pair!r} in {name!r}; write ?key=value&key=value, "
                             "every key once; the seed is an argument of its own")
        options[key] = value if key == "instruction" else parse_value(value)
    return suite, rest, options


def parse_value(text):
    """'3' -> 3, '0.5' -> 0.5, 'true' -> True, anything else stays a string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def full_name(name, options):
    """The inverse of parse_name, options in alphabetical order."""
    written = sorted(f"{key}={str(value).lower() if isinstance(value, bool) else value}"
                     for key, value in options.items())
    return name + ("?" + "&".join(written) if written else "")


def fix_instruction(name, instruction):
    """The environment's name with an instruction, a text, among its options in place of its own.
    UsageError for a wrong word, and if it has no instructions."""
    if "instruction" not in getattr(make_env(name).observation_space, "spaces", ()):
        raise UsageError(f"{name} has no instructions; environments that do: maze:, delivery:,"
                         " crafter:instructions")
    return make_env(name, instruction=instruction).name


def nearest(wrong, choices):
    """'nearest: a, b, c', compared without regard to case."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(wrong.lower(), by_lower, n=3, cutoff=0.0)
    return "nearest: " + ", ".join(by_lower[lower] for lower in close)


def one_line(x):
    """Any object for an error message: on one line, not endless."""
    text = " ".join(str(x).split())
    return text if len(text) <= 60 else text[:57] + "..."


def check_options(name, options, allowed):
    """ValueError, with the nearest right ones, if there are other options than these."""
    for key in options:
        if key not in allowed:
            hint = nearest(key, allowed) if allowed else "it takes none"
            raise ValueError(f"unknown option {key!r} for {name!r}; {hint}")


def positive_int(name, key, value):
    """The value of an option that is a whole number >= 1; 1e3 is one, too."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"option {key!r} of {name!r} must be a whole number >= 1, not {value!r}")
    if value > 10**12:
        raise ValueError(f"option {key!r} of {name!r} is at most {10**12}, not {one_line(value)}")
    return int(value)


# ---- 2. Spaces ------------------------------------------------------------------------------
# Observations become one float32 vector, equal number by number to gymnasium's `flatten` but
# several times faster, because the kind of space is asked once.
# The functions live at module level and are bound with `partial`, so environments can be pickled.

LARGEST = 1e15  # of numbers: their squares still fit into float32, summed over a batch


def observation_encoder(space):
    """Uniform observation space, and the function from a raw observation into it."""
    parts = [(path, part, part_encoder(part)) for path, part in leaves(space)]
    images = [(path, part, encode) for path, part, encode in parts if is_image(part)]
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
    (path, image, encode), = images
    uniform = spaces.Dict({"image": image, **({"vector": box} if vectors else {})})
    return uniform, functools.partial(encode_with_image, path, encode, vectors)


def leaves(space, path=()):
    """Yield (path of keys, simple space) of nested Dict and Tuple spaces, in flatten's order."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        inside = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        for key, part in inside:
            yield from leaves(part, path + (key,))
    else:
        yield path, space


def is_image(space):
    """Whether it is uint8 (H, W, C)."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def part_encoder(space):
    """The function from a raw observation in a simple space to a fresh array; it raises something
    if the observation is not in the space, see complaint."""
    if is_image(space):
        return functools.partial(picture, space.shape)
    if isinstance(space, spaces.Discrete):
        return functools.partial(one_hot, int(space.n), int(space.start))
    if isinstance(space, spaces.MultiDiscrete):
        sizes, starts = space.nvec.ravel().tolist(), space.start.ravel().tolist()
        places = itertools.count()
        tables = [{start + i: next(places) for i in range(size)}
                  for size, start in zip(sizes, starts)]
        return functools.partial(many_one_hots, tables, sum(sizes))
    if isinstance(space, spaces.MultiBinary):
        return functools.partial(bits, space.shape)
    if isinstance(space, spaces.Box):
        return functools.partial(plain_numbers, space.shape)
    raise ValueError(f"observations of type {type(space).__name__} are not supported; supported: "
                     "Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple of these")


def one_hot(size, start, value):
    """size numbers, all 0 but a 1 at place value - start."""
    if value < start:  # an array would take -1 for its last place
        raise IndexError
    out = np.zeros(size, dtype=np.float32)
    out[value - start] = 1.0
    return out


def many_one_hots(tables, size, value):
    """One 1 for each of several numbers; tables: {number: its place in the vector}."""
    out = np.zeros(size, dtype=np.float32)
    for table, number in zip(tables, np.ravel(value).tolist(), strict=True):
        out[table[number]] = 1.0
    return out


def bits(shape, value):
    """0s and 1s as a float32 vector."""
    numbers = plain_numbers(shape, value)
    if not np.isin(numbers, (0, 1)).all():
        raise ValueError
    return numbers


def plain_numbers(shape, value):
    """Numbers of this shape as a float32 vector. A little outside of a Box's bounds, as some of
    popgym and gymnasium are, is not too far; see LARGEST."""
    value = np.asarray(value)
    if value.shape != shape or not np.abs(value).max(initial=0) <= LARGEST:  # NaN is not <=
        raise ValueError
    return np.array(value, dtype=np.float32).ravel()


def picture(shape, value):
    """A copy of uint8 (H, W, C)."""
    value = np.array(value)
    if value.shape != shape or value.dtype != np.uint8:
        raise ValueError
    return value


def encode_parts(parts, value):
    """Several parts, (path of keys, encoder) each, side by side in one vector."""
    return np.concatenate([encode(functools.reduce(operator.getitem, path, value))
                           for path, encode in parts])


def encode_with_image(image_path, encode_image, parts, value):
    """A picture beside such a vector."""
    image = encode_image(functools.reduce(operator.getitem, image_path, value))
    return {"image": image, **({"vector": encode_parts(parts, value)} if parts else {})}


def complaint(space, observation):
    """Which part of a raw observation is not in its space, in words; None if all are."""
    for path, part in leaves(space):
        name = "observation" + "".join(f"[{key!r}]" for key in path)
        try:
            value = functools.reduce(operator.getitem, path, observation)
        except (TypeError, LookupError):
            return f"{name} is missing"
        try:
            part_encoder(part)(value)
        except Exception:  # whatever numpy and Python raise for what users may return
            shape = f" of shape {value.shape}" if hasattr(value, "shape") else ""
            right = (f"{part.dtype} of shape {part.shape}, finite, at most {LARGEST:g}"
                     if isinstance(part, spaces.Box) else f"in {one_line(part)}")
            return f"{name} is {one_line(repr(value))}{shape}, not {right}"
    return None


def action_decoder(space):
    """Uniform action space, and the function from an action in it to what the raw env wants."""
    if isinstance(space, spaces.Discrete):
        # To plain ints, because some popgym classes reject everything else. A dict, because a list
        # would silently take -1 for the last action.
        table = {i: int(space.start) + i for i in range(space.n)}
        return spaces.Discrete(space.n), functools.partial(decode_discrete, table)
    if isinstance(space, spaces.MultiDiscrete):
        uniform = spaces.MultiDiscrete(space.nvec.ravel())
        return uniform, functools.partial(decode_many, uniform.nvec, space.start)
    floats = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
    if not floats or len(space.shape) != 1 or not space.is_bounded():
        raise ValueError(f"actions of type {type(space).__name__}{space.shape} are not supported; "
                         "supported: Discrete, MultiDiscrete, 1-D float Box with finite bounds")
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    uniform = spaces.Box(-1.0, 1.0, space.shape, np.float32)
    return uniform, functools.partial(decode_box, low, high, space.dtype)


def decode_discrete(table, action):
    """Number -> the raw env's number; KeyError or TypeError if it is not an action."""
    return table[operator.index(action.item() if isinstance(action, np.ndarray) else action)]


def decode_many(nvec, start, action):
    """Numbers counted from 0 -> in the shape and from the start that the raw env has; ValueError,
    or TypeError if one is not below its nvec."""
    action = np.asarray(action).ravel()
    if (action.dtype.kind not in "iu" or len(action) != len(nvec) or (action < 0).any()
            or (action >= nvec).any()):
        raise ValueError
    return action.reshape(start.shape) + start


def decode_box(low, high, dtype, action):
    """From [-1, 1] to [low, high]; ValueError or TypeError for anything else."""
    action = np.asarray(action, dtype=np.float64)
    if action.shape != low.shape or not (np.abs(action) <= 1.0).all():  # NaN is not <=
        raise ValueError
    # the two-sided form hits both bounds exactly; low + part * (high - low) may miss one by an ulp
    part = action * 0.5 + 0.5
    return (low * (1.0 - part) + high * part).astype(dtype)


# ---- 3. The adapter -------------------------------------------------------------------------


class Seeded(gymnasium.Env):
    """Every episode has a seed of its own, so that any one of them can be played again.

    np_random draws these seeds and nothing else. A subclass has begin(seed, options).
    """

    first_seed = None  # set by make_env, used up by the first reset

    def reset(self, *, seed=None, options=None):
        if seed is None:
            seed = self.first_seed
        self.first_seed = None
        super().reset(seed=seed)
        options = dict(options or {})
        self.episode = options.pop("episode", seed)
        if self.episode is None:
            self.episode = int(self.np_random.integers(2**31))
        return self.begin(self.episode, options)


class Adapter(Seeded):
    """One thin layer around a raw environment: uniform spaces, clean info, optional time limit.

    `limit`: truncate after so many steps; None leaves the end of a rollout to the raw env.
    """

    def __init__(self, inner, name, horizon, limit=None, references=None, max_return=None,
                 needs=""):
        self.inner, self.name, self.horizon, self.needs = inner, name, horizon, needs
        self.references, self.max_return = dict(references or {}), max_return
        self.observation_space, self._encode = observation_encoder(inner.observation_space)
        self.action_space, self._decode = action_decoder(inner.action_space)
        self.metadata, self.render_mode = inner.metadata, inner.render_mode
        self._limit = float("inf") if limit is None else limit
        self.time = 0

    def begin(self, seed, options):
        self.time = 0
        with absent_packages_named(self.name):
            observation, info = self.reset_inner(seed, options or None)
        return self.encode(observation), public_info(info)

    def reset_inner(self, seed, options):
        return self.inner.reset(seed=seed % 2**32, options=options)  # all that some take

    def step(self, action):
        try:
            raw_action = self._decode(action)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{self.name}: action {one_line(repr(action))} is not in"
                             f" {self.action_space}") from None
        result = self.inner.step(raw_action)
        self.time += 1
        if not (isinstance(result, tuple) and len(result) == 5 and isinstance(result[4], dict)):
            raise self.broken("what step returns is not (observation, reward, terminated,"
                              " truncated, info dict)")
        observation, reward, terminated, truncated, info = result
        truncated = bool(truncated) or self.time >= self._limit
        try:
            reward = float(reward)
        except (TypeError, ValueError):
            raise self.broken(f"the reward is {one_line(repr(reward))}") from None
        return self.encode(observation), reward, bool(terminated), truncated, public_info(info)

    def encode(self, observation):
        try:
            return self._encode(observation)
        except Exception:
            wrong = complaint(self.inner.observation_space, observation)
            if not wrong:
                raise
        raise self.broken(wrong)

    def broken(self, what):
        return BrokenEnvironment(f"{self.name}: at step {self.time}, {what}")

    def render(self):
        with absent_packages_named(self.name):
            return self.inner.render()

    def close(self):
        self.inner.close()


def public_info(info):
    """Only success, and reset = True where an inner episode begins, are passed on: popgym's info
    holds card counts and bandit probabilities."""
    reset = info.get("reset")
    public = {"reset": True} if isinstance(reset, (bool, np.bool_)) and reset else {}
    for key in ("success", "is_success"):
        if info.get(key) is not None:
            return {**public, "success": float(info[key])}
    return public


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
    """`popgym:RepeatPreviousEasy`, see POPGYM; without a difficulty, Easy."""
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
        inner, name, horizon, references=known, max_return=1.0 if family in SOLVABLE else None,
        needs="memory")


def split_difficulty(name):
    """'RepeatFirstHard' -> ('RepeatFirst', 'Hard'), 'RepeatFirst' -> ('RepeatFirst', '')"""
    difficulty = next((word for word in DIFFICULTIES if name.endswith(word)), "")
    return name.removesuffix(difficulty), difficulty


def need(module, requirement, name):
    """ModuleNotFoundError with the command that installs it, if the module is absent."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{name!r} needs {module}: pip install {requirement}")


def popgym_names():
    """All that can be built here; mazes need mazelib."""
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
            return super().reset_inner(seed, options)
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
    with absent_packages_named(f"gym:{name}"):
        make = spec.entry_point
        make = make if callable(make) else gymnasium.envs.registration.load_env_creator(make)
        if "render_mode" in options:
            check_render_mode(full, options["render_mode"], make)
        try:
            # no TimeLimit and no checker around it: the adapter counts the steps itself
            inner = gymnasium.make(spec, max_episode_steps=-1, disable_env_checker=True, **options)
        except PACKAGE_ABSENT:
            raise
        except Exception as error:
            if not options:  # the environment's own bug, shown as it is: no ValueError any more
                raise RuntimeError(f"{full!r} cannot be built") from error
            if re.search("unexpected keyword|multiple values", str(error)):
                check_options(full, options, ["horizon", *inspect.signature(make).parameters])
            raise ValueError(f"{full!r} cannot be built: {error!r}") from error
    return Adapter(inner, full, horizon, limit=horizon)


def check_render_mode(full, mode, make):
    """gymnasium itself only warns of a mode that the environment does not have."""
    metadata = getattr(make, "metadata", None)
    modes = metadata.get("render_modes") if isinstance(metadata, dict) else None
    if modes is not None and mode not in modes:
        raise ValueError(f"option 'render_mode' of {full!r} must be one of {', '.join(modes)}; "
                         + nearest(str(mode), modes))


def gym_spec(name):
    """`module:Id` imports the module first, which is how other packages add their ids."""
    module, colon, name_there = name.rpartition(":")
    if colon and module.isidentifier():
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"{'gym:' + name!r} needs the module {module}: there is no"
                                      f" {module}.py beside amago_min.py, nor such a package")
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever is wrong in somebody's module
            raise ValueError(f"module {module!r} of 'gym:{name}' cannot be imported: "
                             + " ".join(f"{type(error).__name__}: {error}".split())) from error
    if name_there not in gymnasium.registry or (colon and not module.isidentifier()):
        raise ValueError(f"unknown environment {'gym:' + name!r}; "
                         + nearest("gym:" + name_there, gym_names()))
    return gymnasium.registry[name_there]


def gym_names():
    """All ids that are registered."""
    return ["gym:" + name for name in gymnasium.registry]


PACKAGE_ABSENT = (ImportError, gymnasium.error.DependencyNotInstalled)


@contextlib.contextmanager
def absent_packages_named(name):
    """gymnasium's environments notice that a package is absent when they are made, begun or drawn:
    one line with the command that installs it."""
    try:
        yield
    except PACKAGE_ABSENT as error:
        if "cannot import name" in str(error):
            raise  # the package is there
        raise ModuleNotFoundError(f"{name} needs a package: {pip_command(error)}") from error


def pip_command(error):
    """The command in gymnasium's own message, or one made from the name of the module."""
    command = re.findall(r"pip install (?:\"[^\"]+\"|[^\s`\"]+)", str(error))
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
    inner = make_env(inner_name, **options)
    if isinstance(inner, Meta):
        raise ValueError(f"'meta:{name}' puts meta inside meta; nearest: {inner.name}")
    name, _, query = inner.name.partition("?")
    query = "&".join(sorted([f"episodes={episodes}", *filter(None, [query])]))
    return Meta(inner, episodes, f"meta:{name}?{query}")


NEEDS = ("memory", "adaptation", "instructions")  # what an agent may need that plain RL lacks


class Meta(Seeded):
    """k episodes of one sampled task glued into one rollout (RL^2, after Duan et al. 2016).

    The task is a seed drawn at reset; every inner episode starts from that seed, so the deck, the
    bandit arms, the maze are the same k times, and what was learnt in one episode pays in the next.

        inner step     last of episode 1            last of episode k
        observation    first of episode 2           the terminal one
        info           reset=True, episode_return   episode_return
        ends           no                           as the inner env says
    """

    def __init__(self, inner, episodes, name):
        self.inner, self.episodes, self.name = inner, episodes, name
        self.horizon = episodes * inner.horizon
        self.observation_space, self.action_space = inner.observation_space, inner.action_space
        self.metadata, self.render_mode = inner.metadata, inner.render_mode
        # memory comes first, instructions come last
        also = [need for need in inner.needs.split(", ") if need not in ("", "adaptation")]
        self.needs = ", ".join(sorted([*also, "adaptation"], key=NEEDS.index))
        self.keys = getattr(inner, "keys", {})
        self.max_return = None if inner.max_return is None else episodes * inner.max_return
        # what is best in one episode says little about k of them, unless it is the maximum
        self.references = {} if self.max_return is None else {"best": self.max_return}
        if "random" in inner.references:
            self.references["random"] = episodes * inner.references["random"]

    def begin(self, seed, options):
        self._number, self._return, self._options = 1, 0.0, options or None
        return self.inner.reset(seed=seed, options=self._options)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.inner.step(action)
        self._return += reward
        if terminated or truncated:
            info["episode_return"] = self._return
            if self._number < self.episodes:
                self._number, self._return = self._number + 1, 0.0
                # the first observation takes the place of the terminal one, which leads nowhere
                observation, _ = self.inner.reset(seed=self.episode, options=self._options)
                terminated = truncated = False
                info["reset"] = True
        return observation, reward, terminated, truncated, info

    def render(self):
        return self.inner.render()

    def close(self):
        self.inner.close()


# ---- 7. Own worlds and instructions ---------------------------------------------------------
# The environments below are written here, so they share their bookkeeping.


class World(Seeded):
    """What the environments written in this file share: seeds, clock, refusal of wrong actions.

    A subclass sets name, horizon, observation_space and action_space, and has

        draw(rng)      set up a new episode; everything random comes from rng
        act(action)    step number self.time, from 1 -> (reward, terminated, info)
        observe()      the observation, in arrays that nobody else holds

    and, if a person can play it, render() -> uint8 (H, W, 3) and keys = {key: action}.
    """

    references, max_return, needs, keys = {}, None, "", {}
    time, over = 0, True

    def begin(self, seed, options):
        """`options` go to draw as keyword arguments."""
        if options:
            known = [*inspect.signature(self.draw).parameters][1:]
            check_options(f"reset of {self.name}", options, known)
        self.draw(np.random.default_rng(seed), **options)
        self.time, self.over = 0, False
        return self.observe(), {}

    def step(self, action):
        if self.over:
            raise gymnasium.error.ResetNeeded(f"{self.name}: the episode is over, call reset()")
        if not self.action_space.contains(action):
            raise ValueError(f"{self.name}: action {action!r} is not in {self.action_space}")
        self.time += 1
        reward, terminated, info = self.act(action)
        truncated = self.time == self.horizon and not terminated
        self.over = terminated or truncated
        if self.over:
            self.end(info)
        return self.observe(), reward, terminated, truncated, info

    def end(self, info):
        """Add to the last step's info."""


# An instruction is a list of goals that have to be reached in order: int32 (K, W), a row of W
# words per goal, all zeros after the last; a goal's first word is never 0. The agent sees it as
# (K, 1 + W), each goal's status in front:
NO_GOAL, WAITING, ACTIVE, DONE = range(4)


def instruction_reward(instruction, progress, achieved):
    """The one rule of all instructions, for acting and for relabeling. -> (reward, progress)

    progress: number of goals done. achieved: (n, W), the goals that one step reached; it earns 1.0
    if the next one is among them. At most one goal per step, so "place plant x2" takes two.
    """
    if progress < len(instruction):
        goal = instruction[progress].tolist()
        if goal[0] and goal in achieved.tolist():
            return 1.0, progress + 1
    return 0.0, progress


def show_instruction(instruction, progress):
    """(K, W) -> what the agent sees, (K, 1 + W)."""
    shown = np.zeros((len(instruction), 1 + instruction.shape[1]), np.int32)
    shown[:, 1:] = instruction
    status = shown[:, 0]  # a view
    status[instruction[:, 0] != 0] = WAITING
    status[:progress] = DONE
    if progress < len(status) and status[progress] == WAITING:
        status[progress] = ACTIVE
    return shown


class Instructed(World):
    """A world with an instruction, and what relabeling has to know of it:

        env.instruction    int32 (K, W); env.progress: goals done so far
        info["achieved"]   int32 (n, W), in every step: the goals that it reached, n may be 0;
                           nothing is reached before the first step; n <= env.max_achieved
        info["success"]    1.0 or 0.0: all goals done, info["goals_done"]; in the last step alone
        env.reward, .show  instruction_reward and show_instruction
        env.parse_instruction, .format_instruction: text <-> (K, W)

    An instruction given to make_env stands for all episodes, one given to reset(options=
    {"instruction": text or array}) for that one; it is no part of env.episode.

    A subclass calls set_up in its constructor, and has instead of draw and act

        begin_world(rng, goals)   set up a new episode for this list of goals; draw the goals
                                  if it is None; -> the goals
        move(action)              one step -> (goals reached by it (n, W), died)
        look()                    observation without the instruction, {"vector": ...}
        parse_goal(text)          W numbers from small letters, ValueError with the nearest right
                                  words
        format_goal(numbers)      text; the inverse
    """

    metadata, render_mode = {"render_modes": ["rgb_array"]}, "rgb_array"
    reward, show = staticmethod(instruction_reward), staticmethod(show_instruction)
    max_achieved = 1  # largest number of goals that one step can reach

    def set_up(self, name, options, goals, words, vocabulary, **parts):
        """Name and observation space. `options` are those of the name, maybe "instruction" too.

        goals: K, the largest number. vocabulary: words are below it. parts: of the observation.
        """
        self.name, self.max_goals, self.words = name, goals, words
        self.observation_space = spaces.Dict(**parts, instruction=spaces.Box(
            0, max(DONE, vocabulary - 1), (goals, 1 + words), np.int32))
        self.fixed = None
        if "instruction" in options:
            self.fixed = self.read_instruction(options["instruction"])
            options = {**options, "instruction": self.format_instruction(self.fixed)}
        self.name = full_name(name, options)

    def draw(self, rng, instruction=None):
        given = self.fixed if instruction is None else self.read_instruction(instruction)
        goals = self.begin_world(rng, None if given is None else goal_list(given))
        self.instruction = np.zeros((self.max_goals, self.words), np.int32)
        self.instruction[:len(goals)] = goals
        self.progress, self.goals = 0, len(goals)
        self._shown = show_instruction(self.instruction, 0)

    def act(self, action):
        achieved, died = self.move(action)
        achieved = np.array(achieved, np.int32).reshape(-1, self.words)
        reward, progress = instruction_reward(self.instruction, self.progress, achieved)
        if progress != self.progress:
            self.progress = progress
            self._shown = show_instruction(self.instruction, progress)
        return reward, died or progress == self.goals, {"achieved": achieved}

    def observe(self):
        return {**self.look(), "instruction": self._shown.copy()}

    def end(self, info):
        info["success"], info["goals_done"] = float(self.progress == self.goals), self.progress

    def checklist(self):
        """For people: '[x] eat cow  [ ] place plant'"""
        goals = map(self.format_goal, goal_list(self.instruction))
        return "  ".join(f"[{'x' if i < self.progress else ' '}] {goal}"
                         for i, goal in enumerate(goals))

    def read_instruction(self, given):
        """Text or array -> (K, W), checked."""
        if not isinstance(given, str):
            array = np.asarray(given)
            if array.ndim != 2 or array.shape[1] != self.words or array.dtype.kind not in "iu":
                raise ValueError(f"an instruction of {self.name} is text or whole numbers of shape "
                                 f"(goals, {self.words}), not {shorten(str(given))}")
            if array[len(goal_list(array)):].any():
                raise ValueError(f"an instruction of {self.name} has a goal after an empty row")
            given = self.format_instruction(array)
        return self.parse_instruction(given)

    def parse_instruction(self, text):
        """'place plant x2, travel to (10, 10)' -> (K, W)"""
        goals = []
        for part in re.split(r",(?![^(]*\))", text):  # commas outside of brackets
            part = " ".join(part.lower().split())
            one, times, number = re.fullmatch(r"(.*?)( x([1-9][0-9]{0,2}))?", part).groups()
            goals += [self.parse_goal(one)] * (int(number) if times else 1)
        if not 1 <= len(goals) <= self.max_goals:
            raise ValueError(f"{self.name} takes 1 to {self.max_goals} goals, not {len(goals)}: "
                             f"{shorten(text)}")
        instruction = np.zeros((self.max_goals, self.words), np.int32)
        instruction[:len(goals)] = goals
        return instruction

    def format_instruction(self, instruction):
        """(K, W) -> 'place plant x2, travel to (10, 10)'"""
        parts = []
        for goal, same in itertools.groupby(goal_list(instruction)):
            times = len(list(same))
            parts.append(self.format_goal(goal) + (f" x{times}" if times > 1 else ""))
        return ", ".join(parts)


def has_hindsight(env, config):
    """Whether the goals of this environment can be relabeled. UsageError, with the reason, if an
    option of `config` asks for what its instructions, or that it has none, do not allow."""
    if hasattr(env, "max_achieved"):
        return True
    instructed = "instruction" in getattr(env.observation_space, "spaces", ())
    why = (f"relabeling does not go through meta:, as in {env.name}" if instructed else
           f"{env.name} has no instructions")
    for option, given in ((f"--relabel {config.relabel}", config.relabel in ("some", "all")),
                          ("--no-importance", not config.importance),
                          ("--hide-plan", config.hide_plan and not instructed)):
        if given:
            raise UsageError(f"{option}: {why}")
    return False


def goal_list(instruction):
    """The rows up to the first that holds no goal."""
    return list(itertools.takewhile(lambda goal: goal[0] != 0, np.asarray(instruction).tolist()))


def shorten(text):
    """For error messages: on one line, not endless."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


class GoalRarity:
    """Importance sampling of hindsight goals ([1] App. B): what is rarely met teaches most.

        weight(goal) = (-log10 f)^4 in [1e-3, 1e5],    a step weighs the sum of its goals

    f: the share of steps that reached the goal, or that of rollouts, one or the other for a whole
    relabeling. For each draw the weights are shaped in one of four ways: left out (p = .2), minus
    their minimum (.1), minus their median (.1), the five largest alone (.6).
    """

    def __init__(self):
        self.steps, self.rollouts, self.total = {}, {}, [0, 0]   # goal -> count; of all

    def update(self, achieved):
        """achieved (T, M, W) of a new rollout."""
        goals = [tuple(goal) for goal in achieved[achieved[..., 0] != 0].tolist()]
        for table, found in ((self.steps, goals), (self.rollouts, set(goals))):
            for goal in found:
                table[goal] = table.get(goal, 0) + 1
        self.total = [self.total[0] + len(achieved), self.total[1] + 1]

    def state(self):
        """As plain data, for a checkpoint."""
        return [*(list(table.items()) for table in (self.steps, self.rollouts)), self.total]

    def restore(self, state):
        self.steps, self.rollouts = ({tuple(goal): n for goal, n in table} for table in state[:2])
        self.total = state[2]

    def choose(self, reached, steps, h, rng):
        """h of `steps` without replacement, and a goal of each -> (steps, goals (h, W))"""
        which = int(rng.integers(2))
        table, total = (self.steps, self.rollouts)[which], max(1, self.total[which])
        here, picked, goals = reached[steps], [], []                     # (n, M, W)
        counts = [[table.get(tuple(goal), 1e-3) for goal in step] for step in here.tolist()]
        weight = np.clip(np.log10(np.minimum(np.array(counts) / total, 1)) ** 4, 1e-3, 1e5)
        weight[here[..., 0] == 0] = 0                                    # (n, M)
        for _ in range(h):
            left = np.setdiff1d(np.arange(len(steps)), picked)
            i = rng.choice(left, p=self.shaped(weight[left].sum(1), rng))
            met = np.flatnonzero(weight[i])
            picked.append(i)
            goals.append(here[i, rng.choice(met, p=self.shaped(weight[i, met], rng))])
        return steps[picked], goals

    @staticmethod
    def shaped(weight, rng):
        """Probabilities (n,) from weights (n,)"""
        kind = rng.choice(4, p=(0.2, 0.1, 0.1, 0.6))
        shaped = (np.ones_like(weight), weight - weight.min(),
                  np.maximum(weight - np.median(weight), 1e-5),
                  np.where(weight >= np.sort(weight)[-5:][0], weight, 0.0))[kind]
        return shaped / shaped.sum() if shaped.sum() > 0 else np.full(len(weight), 1 / len(weight))


# ---- 8. Memory and meta-RL worlds -----------------------------------------------------------
# Sources are sections and appendices of the AMAGO paper [1].

WEST, NORTH, EAST, SOUTH, STAY = range(5)  # the actions in a grid; row 0 is north, column 0 west
STEPS = ((0, -1), (-1, 0), (0, 1), (1, 0), (0, 0))
GRID_KEYS = {"a": WEST, "w": NORTH, "d": EAST, "s": SOUTH, " ": STAY}


def grid_size(suite, text, smallest):
    """'9x9' -> (9, 9)"""
    found = [clip(int(x), smallest, 999) for x in re.findall("[0-9]{1,9}", text)] or [9]
    rows, columns = found[0], found[-1]
    if text != f"{rows}x{columns}":
        raise ValueError(f"unknown environment {suite + ':' + text!r}; sizes are rows x columns, "
                         f"{smallest} to 999 each; nearest: {suite}:{rows}x{columns}")
    return rows, columns


def road_length(suite, text, low, high):
    """'100' -> 100"""
    number = int(text) if re.fullmatch("-?[0-9]{1,99}", text) else None
    length = clip(100 if number is None else number, low, high)
    if length != number:
        raise ValueError(f"unknown environment {suite + ':' + text!r}; the length is a whole number"
                         f" from {low} to {high}; nearest: {suite}:{length}")
    return length


def clip(number, low, high):
    """The nearest one from low to high."""
    return min(max(number, low), high)


def flag(name, key, value):
    """An option that is true or false, or 1 or 0."""
    if value not in (0, 1):
        choices = [f"{key}=true", f"{key}=false"]
        raise ValueError(f"option {key!r} of {name!r} must be true or false, not {value!r}; "
                         + nearest(f"{key}={value}", choices))
    return bool(value)


def goal_limit(name, goals):
    """The option "goals": the largest number of goals of an instruction, 1 to 5."""
    if positive_int(name, "goals", goals) > 5:
        raise ValueError(f"option 'goals' of {name!r} must be 1 to 5, not {goals}; "
                         "nearest: goals=5")
    return int(goals)


class DarkKey(World):
    """`darkkey:9x9`: find a key, then a door, without seeing either ([1] 5.1, App. C.2).

    Rules        Start, key and door are independent uniform cells, the same during the whole
                 rollout. +1 for the first visit to the key, +1 for a visit to the door with the
                 key, at most one of the two per step. After the door or 50 steps a new inner
                 episode begins: back to the start, without the key, info["reset"] is True, and
                 its first observation takes the place of the last one.
    Observation  row / rows, column / columns, has the key, step of the inner episode / 50
    Actions      west, north, east, south, stay; a step against a wall stays
    Ends         after 500 steps, truncated
    Options      fixed_start=true: always from cell (0, 0), as in the 8x8 comparison with
                 Algorithm Distillation
    Returns      9x9: random 2.7, best known 86 (search cell by cell, the nearest first, then
                 the shortest way; it would be 101 with eyes open), paper 38 and rising
    """

    LIMIT = 50
    metadata, render_mode = {"render_modes": ["rgb_array"]}, "rgb_array"
    # (rows, columns, fixed start): random, best known, paper (its highest, read off the figures)
    RETURNS = {(9, 9, False): (2.67, 86.3, 38.0), (8, 8, True): (3.24, 83.2, 50.2),
               (5, 5, False): (9.07, 178.0)}
    needs, keys = "memory, adaptation", GRID_KEYS

    def __init__(self, size, /, **options):
        self.rows, self.columns = grid_size("darkkey", size, 2)
        name = f"darkkey:{self.rows}x{self.columns}"
        check_options(name, options, ["fixed_start"])
        self.fixed_start = flag(name, "fixed_start", options.get("fixed_start", False))
        self.name = full_name(name, {"fixed_start": True} if self.fixed_start else {})
        self.horizon = 500
        known = self.RETURNS.get((self.rows, self.columns, self.fixed_start), ())
        self.references = dict(zip(("random", "best", "paper"), known))
        self.observation_space = spaces.Box(0, 1, (4,), np.float32)
        self.action_space = spaces.Discrete(5)

    def draw(self, rng):
        cells = rng.integers((self.rows, self.columns), size=(3, 2))
        self.start, self.key, self.door = map(tuple, cells.tolist())
        if self.fixed_start:
            self.start = (0, 0)
        self.begin_episode()

    def begin_episode(self):
        self.position, self.has_key, self.inner_time, self.inner_return = self.start, False, 0, 0.0

    def act(self, action):
        self.position = self.neighbour(action)
        reward, opened = 0.0, False
        if not self.has_key and self.position == self.key:
            self.has_key, reward = True, 1.0
        elif self.has_key and self.position == self.door:
            opened, reward = True, 1.0
        self.inner_time += 1
        self.inner_return += reward
        info = {}
        if opened or self.inner_time == self.LIMIT:
            info["episode_return"] = self.inner_return
            if self.time < self.horizon:
                info["reset"] = True
                self.begin_episode()
        return reward, False, info

    def neighbour(self, action):
        (row, column), (down, right) = self.position, STEPS[action]
        return clip(row + down, 0, self.rows - 1), clip(column + right, 0, self.columns - 1)

    def observe(self):
        row, column = self.position
        return np.array((row / self.rows, column / self.columns, self.has_key,
                         self.inner_time / self.LIMIT), np.float32)

    def render(self):
        """Key and door are drawn, though the agent does not see them."""
        picture, size = draw_cells(np.zeros((self.rows, self.columns), bool))
        picture[::size] = picture[:, ::size] = PATH  # lines between the cells
        fill_square(picture, *centre(self.door, size), 0.4 * size, DOOR)
        if not self.has_key:
            fill_disc(picture, *centre(self.key, size), 0.4 * size, KEY)
        fill_disc(picture, *centre(self.position, size), 0.25 * size, AGENT)
        return picture


class TMaze(World):
    """`tmaze:100`: remember the very first observation until the end ([1] 5.1; Ni et al. 2023).

    Rules        A corridor of H cells to the east ends in a junction, with one cell to its north
                 and one to its south; one of the two is the goal. The first observation tells
                 which. 1 if the agent is there after H + 1 steps, which is the earliest possible;
                 -1/H for each of the first H actions that is not "east".
    Observation  is at the end (junction or beyond); +1 north, -1 south: where the agent is at the
                 end, or, in the very first observation alone, the goal
    Actions      east, north, west, south; a step against a wall stays
    Ends         after H + 1 steps, terminated: the last one decides
    Returns      random -.75, best 1 (without memory .5); the paper solves H = 10 000
    """

    needs, keys = "memory", {"d": 0, "w": 1, "a": 2, "s": 3}

    def __init__(self, length, /, **options):
        self.length = road_length("tmaze", length, 1, 100_000)
        self.name, self.horizon = f"tmaze:{self.length}", self.length + 1
        check_options(self.name, options, ())
        self.observation_space = spaces.Box(np.float32([0, -1]), np.float32([1, 1]))
        self.action_space = spaces.Discrete(4)
        self.references = {"random": -0.75 + 0.25 ** (self.length + 1), "best": 1.0}
        if self.length <= 10_000:
            self.references["paper"] = 1.0
        self.max_return = 1.0

    def draw(self, rng):
        self.goal = int(rng.choice((-1, 1)))
        self.x = self.y = 0

    def act(self, action):
        along, across = ((1, 0), (0, 1), (-1, 0), (0, -1))[action]
        if along and self.y == 0:
            self.x = clip(self.x + along, 0, self.length)
        elif across and self.x == self.length:
            self.y = clip(self.y + across, -1, 1)
        if self.time == self.horizon:
            return float(self.y == self.goal), True, {}
        return (0.0 if action == 0 else -1.0 / self.length), False, {}

    def observe(self):
        hint = self.goal if self.time == 0 else 0
        return np.array((self.x == self.length, self.y or hint), np.float32)

    def end(self, info):
        info["success"] = float(self.y == self.goal)


class Wind(World):
    """`wind:`: hold a place against an unknown steady wind ([1] 5.1; Ni et al. 2022).

    Rules        A point starts at (0, 0). Each step adds 0.1 x action and the rollout's wind,
                 uniform in [-.08, .08]^2. 1 for each step that ends within .03 of (0, 1).
    Observation  position x, y
    Actions      Box(-1, 1, (2,))
    Ends         after 75 steps, truncated
    Returns      random 0, best known 62.1 (straight to the goal, correcting for the wind
                 that the first step shows); the paper reaches 61 to 62 with a fixed set of winds
    """

    GOAL, RADIUS, needs = (0.0, 1.0), 0.03, "adaptation"

    def __init__(self, name, /, **options):
        if name:
            raise ValueError(f"unknown environment {'wind:' + name!r}; nearest: wind:")
        self.name, self.horizon = "wind:", 75
        check_options(self.name, options, ())
        self.observation_space = spaces.Box(-13.5, 13.5, (2,), np.float32)  # 75 x (.1 + .08)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.references = {"random": 0.0, "best": 62.1, "paper": 61.5}

    def draw(self, rng):
        self.wind = rng.uniform(-0.08, 0.08, 2).tolist()
        self.position = (0.0, 0.0)

    def act(self, action):
        self.position = tuple(here + 0.1 * float(push) + wind for here, push, wind
                              in zip(self.position, action, self.wind))
        return float(math.dist(self.position, self.GOAL) < self.RADIUS), False, {}

    def observe(self):
        return np.array(self.position, np.float32)


def cheetah_env(name, **options):
    """`cheetah:vel`: 3 episodes of 200 steps with one hidden target speed ([1] App. C.2)."""
    if name != "vel":
        raise ValueError(f"unknown environment {'cheetah:' + name!r}; nearest: cheetah:vel")
    check_options("cheetah:vel", options, ())
    need("mujoco", '"gymnasium[mujoco]"', "cheetah:vel")
    env = Meta(Adapter(CheetahVelocity(), "cheetah:vel", 200, limit=200), 3, "cheetah:vel")
    env.references = {"random": -1019.0, "paper": -58.0}
    return env


class CheetahVelocity(gymnasium.Wrapper):
    """Run at a speed that only the rewards reveal.

    Rules        The target is uniform in [0, 3], one per rollout. Reward of a step:
                 -|speed - target| - .05 |action|^2
    Observation  gymnasium's HalfCheetah-v5: 17 angles and speeds
    Actions      Box(-1, 1, (6,)), torques
    Returns      in 3 x 200 steps: random -1019, standing still -931, paper -58, without memory
                 -281, the latter two with an older simulator; a gallop by hand that is told the
                 target -127 (median; see the tests); 0 is out of reach, because speeding up costs
    """

    def __init__(self):
        super().__init__(gymnasium.make("HalfCheetah-v5", max_episode_steps=-1,
                                        disable_env_checker=True, ctrl_cost_weight=0.05))

    def reset(self, *, seed=None, options=None):
        self.target = np.random.default_rng(seed).uniform(0.0, 3.0)
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        observation, _, terminated, truncated, info = self.env.step(action)
        reward = info["reward_ctrl"] - abs(info["x_velocity"] - self.target)
        return observation, reward, terminated, truncated, {}


def metaworld_env(name, **options):
    """`metaworld:reach` (any of ML1's 50 tasks) or `metaworld:ML45`, k episodes of 500 steps.

    Options: episodes=k (2), split=test (train). See MetaWorld.
    """
    need("metaworld", "metaworld==3.1.1", "metaworld:" + name)
    choices = metaworld_names()
    full = "metaworld:" + name.removesuffix("-v3")
    if full not in choices:
        raise ValueError(f"unknown environment {full!r}; {nearest(full, choices)}")
    check_options(full, options, ["episodes", "split"])
    episodes = positive_int(full, "episodes", options.get("episodes", 2))
    split = options.get("split", "train")
    if split not in ("train", "test"):
        raise ValueError(f"option 'split' of {full!r} is train or test, not {split!r}")
    written = {"episodes": episodes, **({"split": "test"} if split == "test" else {})}
    raw = MetaWorld(full.removeprefix("metaworld:"), split)
    env = Meta(Adapter(raw, full, 500, limit=500), episodes, full_name(full, written))
    known = zip(("random", "best"), MetaWorld.RETURNS.get(full, ()))
    env.references = {key: episodes * value for key, value in known}
    return env


def metaworld_names():
    """All that can be built here: none without the package."""
    if importlib.util.find_spec("metaworld") is None:
        return []
    tasks = importlib.import_module("metaworld").ML1.ENV_NAMES
    return ["metaworld:ML45", *("metaworld:" + task.removesuffix("-v3") for task in tasks)]


@functools.cache  # ML45 takes half a minute
def metaworld_benchmark(name):
    """The package's classes and tasks, ML45 or those of one class."""
    package = importlib.import_module("metaworld")
    # seed 0: everybody has the same 50 tasks
    return package.ML45(seed=0) if name == "ML45" else package.ML1(f"{name}-v3", seed=0)


class MetaWorld(gymnasium.Env):
    """A robot arm and an object whose place, or the goal's, only the rewards reveal ([1] 5.1).

    Rules        Each rollout draws a class of tasks (ML45: 45 to train, 5 to test), then one of
                 its 50 tasks. Rewards are the package's own, 0 to 10 per step. info["success"]:
                 solved at some time in this episode.
    Observation  39 numbers: gripper and object, now and a step before; the goal is blanked
    Actions      Box(-1, 1, (4,)): gripper's motion and grip
    Returns      per episode of 500 steps, at most 5000: see RETURNS for the tasks that were
                 measured (60 rollouts of reach, 30 of the others); random, and best known: the
                 package's scripted policies, which are shown the goal
    """

    RETURNS = {"metaworld:reach": (696.0, 4835.0), "metaworld:push": (27.7, 4187.0),
               "metaworld:pick-place": (6.86, 4368.0)}

    observation_space = spaces.Box(-np.inf, np.inf, (39,), np.float64)
    action_space = spaces.Box(-1, 1, (4,), np.float32)

    def __init__(self, name, split):
        self.name, self.split = name, split
        self.loaded = None                                   # the class of self.arm

    def reset(self, *, seed=None, options=None):
        rng = np.random.default_rng(seed)
        benchmark = metaworld_benchmark(self.name)
        classes = getattr(benchmark, f"{self.split}_classes")
        name = list(classes)[rng.integers(len(classes))]
        if name != self.loaded:  # takes .2 s; to keep all of them, 20 MB each, took 15 GB in ML45
            self.arm, self.loaded = classes[name](), name
        tasks = [task for task in getattr(benchmark, f"{self.split}_tasks")
                 if task.env_name == name]
        self.solved = False
        self.arm.set_task(tasks[rng.integers(len(tasks))])
        return self.arm.reset(seed=seed)[0], {}

    def step(self, action):
        observation, reward, terminated, truncated, info = self.arm.step(action)
        self.solved = self.solved or bool(info["success"])
        return observation, reward, terminated, truncated, {"success": self.solved}


# ---- 9. Instruction worlds ------------------------------------------------------------------


class Maze(Instructed):
    """`maze:15x15`: visit cells of an unknown maze in the given order ([1] 5.2, App. C.4).

    Rules        Every rollout has a new maze (see draw_maze; an even size is made odd) and goals:
                 distinct free cells. +1 for each one reached, in order. The agent starts in the
                 south, in the middle, in a strip that always looks the same.
    Observation  row / rows, column / columns, then the number of free cells to the west, north,
                 east and south, / columns or rows; and the instruction
    Actions      west, north, east, south, stay; a step into a wall stays
    Ends         terminated with the last goal; truncated after 400 steps in 15x15, 1000 in 31x31,
                 other sizes on a straight line through these two
    Instruction  "travel to (row, column)" or "go to"; a goal inside a wall opens the wall
    Options      goals=n: 1 to n of them, n = 1..5 (3); rewired=1: the four directions are permuted
                 anew in every rollout; position=0: the agent does not see where it is
    Returns      random see RANDOM, best 2 on average, (n + 1) / 2 with goals=n; successes in the
                 paper: 15x15 97 %, without position 91 %; 31x31 ("30x30") 72 %, rewired 68 %
    """

    DEFAULTS = {"goals": 3, "position": True, "rewired": False}
    RANDOM = {(7, 7): 0.81, (15, 15): 0.40, (31, 31): 0.18}  # mean return with up to 3 goals
    keys = GRID_KEYS

    def __init__(self, size, /, **options):
        rows, columns = (2 * (n // 2) + 1 for n in grid_size("maze", size, 5))
        name = f"maze:{rows}x{columns}"
        check_options(name, options, [*self.DEFAULTS, "instruction"])
        options = {**self.DEFAULTS, **options}
        goals = options["goals"] = goal_limit(name, options["goals"])
        for key in ("position", "rewired"):
            options[key] = flag(name, key, options[key])
        self.position_seen, self.rewired = options["position"], options["rewired"]
        self.needs = f"memory, {'adaptation, ' if self.rewired else ''}instructions"
        written = {key: value for key, value in options.items()
                   if key == "instruction" or value != self.DEFAULTS[key]}
        self.rows, self.columns = rows, columns
        self.start = (rows - 2, columns // 2)
        self.horizon = int(400 + 600 / 16 * ((rows + columns) / 2 - 15))
        self.action_space = spaces.Discrete(5)
        self.set_up(name, written, goals, 2, max(rows, columns), vector=spaces.Box(
            0, 1, (6 if self.position_seen else 4,), np.float32))
        self.references = {"best": (1 + goals) / 2}
        if goals == 3 and (rows, columns) in self.RANDOM:
            self.references["random"] = self.RANDOM[rows, columns]
        if self.fixed is not None or goals == 1:
            self.max_return = 1.0 if self.fixed is None else float(len(goal_list(self.fixed)))
            self.references = {"best": self.max_return}

    def begin_world(self, rng, goals):
        wall = draw_maze(self.rows, self.columns, rng)
        wiring = rng.permutation(4).tolist() if self.rewired else range(4)
        self.wiring = [*wiring, STAY]
        if goals is None:
            free = ~wall
            free[self.start] = False
            cells = np.argwhere(free)
            count = rng.integers(1, self.max_goals + 1)
            goals = cells[rng.choice(len(cells), count, replace=False)].tolist()
        else:
            open_cells(wall, goals)
        self.wall, self.views = wall.tolist(), self.all_views(wall)
        self.position, self.path = self.start, [self.start]
        return goals

    def all_views(self, wall):
        """What is seen from every cell, (rows, columns, 6 or 4), so that a step only looks it up.

        Free cells to the west = own column - column of the nearest wall there - 1, and so on.
        """
        row, column = np.indices(wall.shape)
        ahead = np.maximum.accumulate
        west = column - ahead(np.where(wall, column, 0), axis=1) - 1
        north = row - ahead(np.where(wall, row, 0), axis=0) - 1
        # the same from the other end
        back = np.minimum.accumulate
        east = back(np.where(wall, column, self.columns)[:, ::-1], axis=1)[:, ::-1] - column - 1
        south = back(np.where(wall, row, self.rows)[::-1], axis=0)[::-1] - row - 1
        high, wide = self.rows, self.columns
        views = [row / high, column / wide, west / wide, north / high, east / wide, south / high]
        return np.stack(views if self.position_seen else views[2:], axis=-1).astype(np.float32)

    def move(self, action):
        down, right = STEPS[self.wiring[action]]
        row, column = self.position[0] + down, self.position[1] + right
        if not self.wall[row][column]:
            self.position = (row, column)
        self.path.append(self.position)
        return [self.position], False

    def look(self):
        return {"vector": self.views[self.position].copy()}

    def parse_goal(self, text):
        match = re.fullmatch(r"(?:travel|go) to \( ?(-?[0-9]{1,9}) ?, ?(-?[0-9]{1,9}) ?\)", text)
        if not match:
            raise ValueError(f"unknown goal {shorten(text)} in {self.name}; nearest: travel to "
                             "(1, 1), as row and column")
        row, column = map(int, match.groups())
        inside = clip(row, 1, self.rows - 2), clip(column, 1, self.columns - 2)
        if (row, column) != inside:
            raise ValueError(f"({row}, {column}) is not inside {self.name}: rows are 1 to "
                             f"{self.rows - 2}, columns 1 to {self.columns - 2}; nearest: "
                             + self.format_goal(inside))
        return row, column

    def format_goal(self, goal):
        return f"travel to ({goal[0]}, {goal[1]})"

    def render(self):
        picture, size = draw_cells(self.wall)
        for cell in set(self.path):
            fill_square(picture, *centre(cell, size), 0.25 * size, PATH)
        # If two share a cell, the next one is seen; the agent hides no number.
        order = sorted(range(self.goals), key=lambda i: (i >= self.progress, -i))
        number = {tuple(self.instruction[i]): i for i in order}
        for cell, i in number.items():
            fill_square(picture, *centre(cell, size), 0.5 * size, goal_colour(i, self.progress))
        fill_disc(picture, *centre(self.position, size), 0.45 * size, AGENT)
        for cell, i in number.items():
            write_digit(picture, *centre(cell, size), i + 1, size)
        return picture


def draw_maze(rows, columns, rng):
    """(rows, columns) of bool, True = wall. All free cells are connected.

    Walls grow like hedges from random points with even coordinates, two cells at a time, always to
    a point without a wall, until they are stuck: so they never close a loop, and nothing is cut
    off. Then the strip where the agent starts is cleared, and a short corridor built around it.
    """
    wall = np.zeros((rows, columns), bool)
    wall[[0, -1]] = wall[:, [0, -1]] = True
    wall = wall.tolist()
    hedges = int(0.75 * (rows // 2) * (columns // 2))
    points = rng.integers((rows // 2 + 1, columns // 2 + 1), size=(hedges, 2)).tolist()
    choices = iter(rng.random((rows // 2) * (columns // 2)).tolist())  # one per point at most
    for row, column in points:
        row, column = 2 * row, 2 * column
        wall[row][column] = True
        while True:
            free = [(down, right) for down, right in STEPS[:4]
                    if 0 < row + 2 * down < rows and 0 < column + 2 * right < columns
                    and not wall[row + 2 * down][column + 2 * right]]
            if not free:
                break
            down, right = free[int(next(choices) * len(free))]
            for _ in range(2):
                row, column = row + down, column + right
                wall[row][column] = True
    wall = np.array(wall)
    strip = min(4, rows // 3)
    wall[-1 - strip:-1, 1:-1] = False
    wall[-strip:-1, [columns // 2 - 1, columns // 2 + 1]] = True
    return wall


def open_cells(wall, cells):
    """Clear these cells. Only a point where hedges meet can be closed in on all sides then:

    it gets a way out to the west, to where two free cells become one passage.
    """
    for row, column in cells:
        wall[row, column] = False
        if all(wall[row + down, column + right] for down, right in STEPS[:4]):
            wall[row, column - 1] = False


class Delivery(Instructed):
    """`delivery:30`: bring packages to places along a road of forks ([1] 5.2, App. C.3).

    Rules        A round road of L cells. 2 to 6 of them are forks; the same side of a fork is
                 right during the whole rollout and goes on, the other one leads back to cell 0.
                 2 to 4 destinations, in the order of the road, none at a fork. One of four ways
                 to drop a package is right during the whole rollout: with packages left, and not
                 in cell 0, it delivers one here, +1 if this is the next destination. Any other
                 drop leads back to cell 0, but at a fork nothing is dropped at all. There are
                 three packages per destination.
    Observation  cell, packages left, is at a fork; and the instruction
    Actions      forward (not at a fork), left, right (only there), drop 1, 2, 3, 4, wait; what is
                 not possible does nothing
    Ends         terminated when all is delivered, truncated after 6 L steps
    Instruction  "deliver to 7", or "go to", "travel to"; forks keep away from these cells
    Returns      random see RANDOM, best 3 on average, which trying and remembering always
                 reaches; successes in the paper 88 %, without imitation loss 94 %
    """

    RANDOM, needs = {30: 0.18}, "memory, adaptation, instructions"
    FORWARD, LEFT, RIGHT, DROP, WAIT = 0, 1, 2, 3, 7
    keys = {"w": FORWARD, "a": LEFT, "d": RIGHT, "1": 3, "2": 4, "3": 5, "4": 6, " ": WAIT}

    def __init__(self, length, /, **options):
        self.length = road_length("delivery", length, 11, 9999)  # 6 forks, 4 places, cell 0
        self.horizon = 6 * self.length
        name = f"delivery:{self.length}"
        check_options(name, options, ["instruction"])
        self.action_space = spaces.Discrete(8)
        self.set_up(name, options, 4, 1, self.length, vector=spaces.Box(
            np.zeros(3, np.float32), np.float32([self.length - 1, 12, 1])))
        self.references = {"best": 3.0}
        if self.fixed is not None:
            self.references = {"best": float(len(goal_list(self.fixed)))}
        elif self.length in self.RANDOM:
            self.references["random"] = self.RANDOM[self.length]

    def begin_world(self, rng, goals):
        cells = rng.permutation(np.arange(1, self.length)).tolist()
        if goals is None:
            goals = [(cell,) for cell in sorted(cells[:rng.integers(2, 5)])]
        taken = {cell for cell, in goals}
        forks = [cell for cell in cells if cell not in taken][:rng.integers(2, 7)]
        sides = rng.integers(self.LEFT, self.RIGHT + 1, len(forks))
        self.forks = dict(zip(forks, sides.tolist()))
        self.drop = self.DROP + int(rng.integers(4))
        self.position, self.packages = 0, 3 * len(goals)
        return goals

    def move(self, action):
        side = self.forks.get(self.position)
        if action in (self.LEFT, self.RIGHT):
            if side is not None:
                self.position = (self.position + 1) % self.length if action == side else 0
        elif side is None and action == self.FORWARD:
            self.position = (self.position + 1) % self.length
        elif side is None and action != self.WAIT:
            if action == self.drop and self.packages and self.position:
                self.packages -= 1
                return [(self.position,)], False
            self.position = 0
        return [], False

    def look(self):
        return {"vector": np.array((self.position, self.packages, self.position in self.forks),
                                   np.float32)}

    def parse_goal(self, text):
        match = re.fullmatch("(?:deliver|travel|go) to (-?[0-9]{1,9})", text)
        if not match:
            raise ValueError(f"unknown goal {shorten(text)} in {self.name}; nearest: deliver to 7")
        cell = int(match[1])
        if not 1 <= cell < self.length:
            raise ValueError(f"there is no delivery to cell {cell} of {self.name}: cells are 1 to "
                             f"{self.length - 1}; nearest: deliver to "
                             f"{clip(cell, 1, self.length - 1)}")
        return (cell,)

    def format_goal(self, goal):
        return f"deliver to {goal[0]}"

    def render(self):
        """The road as a ring: cell 0 is in the south, it goes clockwise, forks are squares.

        In the middle the packages that are left.
        """
        picture = np.full((256, 256, 3), WALL, np.uint8)
        size = min(2 * math.pi * 104 / self.length, 48)  # of a cell

        def place(cell, radius=104):
            angle = 2 * math.pi * cell / self.length
            return 128 + radius * math.cos(angle), 128 - radius * math.sin(angle)

        for cell in range(self.length):
            fill = fill_square if cell in self.forks else fill_disc
            fill(picture, *place(cell), 0.4 * size, FORK if cell in self.forks else FLOOR)
        for i in sorted(range(self.goals), key=lambda i: (i >= self.progress, -i)):
            y, x = place(self.instruction[i, 0])
            fill_disc(picture, y, x, 0.5 * size, goal_colour(i, self.progress))
            write_digit(picture, y, x, i + 1, size)
        for i in range(self.packages):
            fill_square(picture, 108 + 20 * (i // 4), 98 + 20 * (i % 4), 7, DOOR)
        fill_disc(picture, *place(self.position, 104 - size), 0.4 * size, AGENT)
        return picture


# ---- 10. Pictures --------------------------------------------------------------------------
# Just enough to draw the worlds above with numpy: uint8 (H, W, 3), about 256 pixels wide.

FLOOR, WALL, PATH, AGENT = (245, 242, 232), (62, 68, 88), (176, 205, 238), (70, 130, 255)
KEY, DOOR, FORK = (240, 180, 20), (150, 95, 50), (170, 120, 220)
DIGITS = {  # 3 x 5 pixels, row by row
    1: "010110010010111", 2: "111001111100111", 3: "111001111001111", 4: "101101111001001",
    5: "111100111001111"}


def draw_cells(wall):
    """A picture of this grid, and the size of one cell in pixels."""
    size = max(1, 256 // max(np.shape(wall)))
    picture = np.array([FLOOR, WALL], np.uint8)[np.array(wall, int)]
    return picture.repeat(size, axis=0).repeat(size, axis=1), size


def centre(cell, size):
    """Of a cell, in pixels (y, x)."""
    return (cell[0] + 0.5) * size, (cell[1] + 0.5) * size


def fill_square(picture, y, x, half, colour):
    """In place; half: of a side."""
    top, left = round(max(y - half, 0)), round(max(x - half, 0))
    picture[top:round(y + half), left:round(x + half)] = colour


def fill_disc(picture, y, x, radius, colour):
    """In place, at least one pixel."""
    radius = max(radius, 0.75)  # a pixel's centre is at most .71 away
    rows, columns = np.ogrid[:picture.shape[0], :picture.shape[1]]
    picture[(rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 <= radius ** 2] = colour


def write_digit(picture, y, x, digit, size):
    """As large as fits into a square of this size."""
    scale = max(1, int(size * 0.8) // 5)
    glyph = np.array([*DIGITS[digit]], int).reshape(5, 3).repeat(scale, 0).repeat(scale, 1)
    top, left = round(y - 2.5 * scale), round(x - 1.5 * scale)
    there = picture[top:top + 5 * scale, left:left + 3 * scale]
    there[glyph[:there.shape[0], :there.shape[1]] == 1] = (0, 0, 0)


def goal_colour(number, progress):
    """Grey: done; red: the next one; yellow: later."""
    return (165, 165, 165) if number < progress else (
        (240, 100, 90) if number == progress else (250, 210, 90))


# ---- 11. Crafter ----------------------------------------------------------------------------
# Hafner 2021, "Benchmarking the Spectrum of Agent Capabilities": survive on an island of 64 x 64
# cells and climb a tree of 22 achievements. The game is that of the package, which is imported
# when an environment is made and not before.


class CrafterGame:
    """One game of crafter: in every bit what the package plays, but repeatable and faster.

    World, player, creatures, their rules and the pictures are the package's own objects. What is
    done differently is all here and touches no other user of the package:

    OrderedSet  The package keeps the creatures of each chunk of land in a `set`, whose order
                depends on memory addresses: the same actions lead to different episodes.
    grow        The package asks for 25 000 values of noise one by one, .7 s per world. From world
                to world only some gradients differ, the rest is done once (see CrafterNoise): the
                same worlds in a few ms. So every reset can afford a new one. There is no pool of
                worlds, nothing to refresh, to save or to share, and an episode is one number.
    step        asks the creatures around the player whether they are near, instead of all on the
                island; makes neither picture nor map.
    balance     counts the cells of all chunks at once.
    picture     draws the noise of the night from a generator of its own: looking changes nothing.
    """

    REACH = 17  # creatures this near act: nearer than twice the width of the view
    DIAMOND = np.add.outer(*[np.abs(np.arange(-REACH, REACH + 1))] * 2) <= REACH
    # What a cell of the screen may show: nothing (outside of the island), the package's materials
    # in its order, and what may stand on them. By the names of the package's textures.
    TILES = ("outside", "water", "grass", "stone", "path", "sand", "tree", "lava", "coal", "iron",
             "diamond", "table", "furnace", "player-left", "player-right", "player-up",
             "player-down", "player-sleep", "cow", "zombie", "skeleton", "arrow-left",
             "arrow-right", "arrow-up", "arrow-down", "plant", "plant-ripe")
    ZERO, UNIT = np.float32([[0] * 18 + [30, 30, 0], [1, 1] + [10] * 16 + [60, 60, 1]])
    TILE_NUMBER = {name: number for number, name in enumerate(TILES)}

    def __init__(self):
        from crafter import constants, engine
        self.actions = constants.actions
        self.world = engine.World((64, 64), constants.materials, (12, 12))

    def reset(self, seed):
        """The package's island after World.reset(seed)."""
        from crafter import objects
        self.seed, self.time, self.unlocked, self.last_health = seed, 0, set(), 9
        self.world.reset(seed)
        self.world._chunks = collections.defaultdict(OrderedSet)
        self.set_daylight()
        self.player = objects.Player(self.world, (32, 32))
        self.world.add(self.player)
        self.grow()

    def set_daylight(self):
        self.world.daylight = 1 - np.abs(np.cos(np.pi * (self.time / 300 % 1 + 0.3))) ** 3

    # -- making an island --

    def grow(self):
        """crafter.worldgen, but whole fields at once. Arrays are flat, cell (x, y) at 64 x + y."""
        world, ids = self.world, self.world._mat_ids
        noise = CrafterNoise(world.random.randint(0, 2**31 - 1))
        x, y = np.divmod(np.arange(64 * 64), 64)
        distance = np.sqrt((x - 32) ** 2 + (y - 32) ** 2)
        start = 4 - distance + 2 * noise("start")
        start = 1 / (1 + np.exp(-start))
        water = noise("lakes") + 0.15 * noise("ponds") + 0.1 - 2 * start
        rock = (noise("mountains") + 0.3 * noise("rocks")) / 1.3 - (4 * start + 0.3 * water)

        land = np.full(64 * 64, ids["grass"], np.uint8)
        mountain = np.flatnonzero((start <= 0.5) & (rock > 0.15))
        cave = (noise("caves", mountain) > 0.15) & (rock[mountain] > 0.3)
        solid = mountain[~cave]
        for tunnels in ("tunnels along x", "tunnels along y"):
            solid = solid[~(noise(tunnels, solid) > 0.4)]
        tunnel = np.zeros(64 * 64, bool)
        tunnel[mountain[~cave]], tunnel[solid] = True, False
        land[mountain], land[solid] = ids["path"], ids["stone"]
        deep = solid[rock[solid] > 0.3]
        land[deep[noise("lava", deep) > 0.35]] = ids["lava"]

        plain = np.flatnonzero((start <= 0.5) & (rock <= 0.15))
        shore = plain[(0.25 < water[plain]) & (water[plain] <= 0.35)]
        land[plain[water[plain] > 0.3]] = ids["water"]
        land[shore[noise("sand", shore) > -0.2]] = ids["sand"]

        chances = np.zeros((4, 64 * 64), bool)  # of coal, iron, diamond, tree
        chances[0, solid] = noise("coal", solid) > 0
        chances[1, solid] = noise("iron", solid) > 0.4
        chances[2, solid] = rock[solid] > 0.18
        plain = plain[land[plain] == ids["grass"]]
        chances[3, plain] = noise("trees", plain) > 0
        self.scatter(land, chances)
        world._mat_map = land.reshape(64, 64)
        self.populate(land, distance, tunnel)

    def scatter(self, land, chances):
        """Turn cells of `land` into coal, iron, diamond or tree, where `chances` (4, cells) has it
        that one may be there: one random number per question that comes to be asked."""
        ids, cells = self.world._mat_ids, np.flatnonzero(chances.any(0))
        with uniform_numbers(self.world.random, int(chances.sum())) as uniform:
            for cell, coal, iron, diamond, tree in zip(cells.tolist(), *chances[:, cells].tolist()):
                if coal and uniform() > 0.85:
                    land[cell] = ids["coal"]
                elif iron and uniform() > 0.75:
                    land[cell] = ids["iron"]
                elif diamond and uniform() > 0.994:
                    land[cell] = ids["diamond"]
                elif tree and uniform() > 0.8:
                    land[cell] = ids["tree"]

    def populate(self, land, distance, tunnel):
        """The first cows, zombies and skeletons. distance: of each cell from the player; tunnel:
        whether it was dug as one."""
        from crafter import objects
        world, player, ids = self.world, self.player, self.world._mat_ids
        grass, path = land == ids["grass"], land == ids["path"]
        walkable = grass | path | (land == ids["sand"])
        cow, zombie = grass & (distance > 3), walkable & (distance > 10)
        skeleton = path & tunnel
        cells = np.flatnonzero(cow | zombie | skeleton)
        chances = np.stack([cow, zombie, skeleton])[:, cells]
        with uniform_numbers(world.random, int(chances.sum())) as uniform:
            for cell, cow, zombie, skeleton in zip(cells.tolist(), *chances.tolist()):
                if cow and uniform() > 0.985:
                    world.add(objects.Cow(world, divmod(cell, 64)))
                elif zombie and uniform() > 0.993:
                    world.add(objects.Zombie(world, divmod(cell, 64), player))
                elif skeleton and uniform() > 0.95:
                    world.add(objects.Skeleton(world, divmod(cell, 64), player))

    # -- playing --

    def step(self, action):
        """-> (the package's reward, names of the achievements in this step, first time or not)"""
        world, player, reach = self.world, self.player, self.REACH
        self.time += 1
        self.set_daylight()
        player.action = self.actions[action]
        before, born = list(player.achievements.values()), len(world._objects)
        player.update()
        # nobody moves except by its own update, so all can be asked at once who is near
        x, y = player.pos.tolist()
        left, top = max(x - reach, 0), max(y - reach, 0)
        near = world._obj_map[left:x + reach + 1, top:y + reach + 1]
        column, row = left - x + reach, top - y + reach
        near = near[self.DIAMOND[column:column + near.shape[0], row:row + near.shape[1]]]
        for number in np.sort(near[near > 1]).tolist():  # 0 is nobody, 1 the player
            if number < born:  # the newborn begin with the next step
                world._objects[number].update()
        if self.time % 10 == 0:
            self.balance()
        reward = (player.health - self.last_health) / 10
        self.last_health = player.health
        earned = []
        if before != list(player.achievements.values()):
            earned = [name for count, (name, now) in zip(before, player.achievements.items())
                      if now > count]
            if not self.unlocked.issuperset(earned):
                reward += 1.0
                self.unlocked.update(earned)
        return reward, earned

    @property
    def dead(self):
        return self.player.health <= 0

    def balance(self):
        """Creatures come and go: as many in a chunk as its land, and the light, allow."""
        from crafter.objects import Cow, Skeleton, Zombie
        world, light = self.world, self.world.daylight
        grass, path = (world._mat_map == world._mat_ids[name] for name in ("grass", "path"))
        edges = np.arange(0, 64, 12)
        cells = [np.add.reduceat(np.add.reduceat(land, edges, 0, np.intp), edges, 1).tolist()
                 for land in (grass, path)]
        for chunk, inside in list(world._chunks.items()):
            meadow, tunnels = (count[chunk[0] // 12][chunk[2] // 12] for count in cells)
            kinds = [type(creature) for creature in inside]
            night = 3.5 - 3 * light
            for kind, land, far, leaves, comes, goes, low, high in (
                    (Zombie, grass, 6, 0, 0.3, 0.4, 0 if meadow < 50 else night, night),
                    (Skeleton, path, 7, 7, 0.1, 0.1, 0 if tunnels < 6 else 1, 2),
                    (Cow, grass, 5, 5, 0.01, 0.1, 0 if meadow < 30 else 1, 1.5 + light)):
                count = kinds.count(kind)
                if count < int(low) and world.random.random_sample() < comes:
                    self.spawn(kind, land, chunk, far)
                elif count > int(high) and world.random.random_sample() < goes:
                    creatures = [creature for creature in inside if type(creature) is kind]
                    creature = creatures[world.random.randint(0, count)]
                    if self.player.distance(creature) >= leaves:
                        world.remove(creature)

    def spawn(self, kind, land, chunk, far):
        left, right, top, bottom = chunk
        xs, ys = np.nonzero(land[left:right, top:bottom])
        i = self.world.random.randint(0, len(xs))
        cell = np.array((left + xs[i], top + ys[i]))
        if self.world[cell][1] is None and self.player.distance(cell) >= far:
            fears_player = (self.player,) if kind.__name__ != "Cow" else ()
            self.world.add(kind(self.world, cell, *fears_player))

    # -- looking --

    def screen(self):
        """-> materials, uint8 (9, 7) by column and row; [((column, row), name of a texture)]"""
        (x, y), world = self.player.pos.tolist(), self.world
        left, top = max(x - 4, 0), max(y - 3, 0)
        column, row = left - x + 4, top - y + 3  # > 0 where the screen sticks out of the island
        land = world._mat_map[left:x + 5, top:y + 4]
        beings = world._obj_map[left:x + 5, top:y + 4]
        shown = np.zeros((9, 7), np.uint8)
        shown[column:column + land.shape[0], row:row + land.shape[1]] = land
        return shown, [((column + i, row + j), world._objects[beings[i, j]].texture)
                       for i, j in zip(*map(np.ndarray.tolist, np.nonzero(beings)))]

    def tiles(self):
        """The screen row by row, then the tile that is faced, numbers of TILES: uint8 (64,)."""
        shown, beings = self.screen()
        for cell, name in beings:
            shown[cell] = self.TILE_NUMBER[name]
        x, y = self.player.facing
        return np.append(shown.T.ravel(), shown[4 + x, 3 + y])

    def look(self, pixels):
        """The observation, as a picture or as tiles, without the instruction."""
        shown = {"image": self.picture(64)} if pixels else {"texture": self.tiles()}
        return {**shown, "vector": self.numbers()}

    def numbers(self):
        """float32 (21,): facing x, y; inventory / 10; (x - 30, y - 30) / 60; daylight."""
        player = self.player
        numbers = np.array((*player.facing, *player.inventory.values(), *player.pos.tolist(),
                            self.world.daylight), np.float32)
        return (numbers - self.ZERO) / self.UNIT

    def picture(self, size):
        """What the package draws, uint8 (size, size, 3), but all of the ground at once."""
        from crafter import engine
        textures, ground = crafter_textures(size // 9)
        unit = np.array((size, size)) // 9
        materials, beings = self.screen()
        land = ground[materials].transpose(0, 2, 1, 3, 4).reshape(*unit * (9, 7), 3)
        for cell, name in beings:
            engine._draw_alpha(land, cell * unit, textures.get(name, unit))
        world = types.SimpleNamespace(area=(64, 64),
                                      random=np.random.default_rng((self.seed, self.time)))
        view = engine.LocalView(world, textures, (9, 7))
        land = view._light(land, self.world.daylight)
        if self.player.sleeping:
            land = view._sleep(land)
        items = crafter_items(size // 9, tuple(self.player.inventory.items()))
        picture = np.zeros((size, size, 3), np.uint8)
        edge, extent = size % 9 // 2, 9 * unit[0]
        picture[edge:edge + extent, edge:edge + extent] = np.concatenate(
            [land, items], 1).transpose(1, 0, 2)
        return picture


class OrderedSet(dict):
    """A set that iterates in the order of insertion, as far as crafter's chunks need one."""

    def add(self, item):
        self[item] = None

    def remove(self, item):
        del self[item]


class CrafterNoise:
    """The fields of noise that crafter grows a world from: noise(name, cells) -> one per cell.

    OpenSimplex noise at a point is a sum over the corners of a lattice around it,

        sum of weight * (gradient of the corner . offset from the corner)

    All worlds have the same points, so the same corners, weights and offsets. These come from the
    package's own function, once per process (.5 s). A seed only shuffles the gradients. The sums
    are done in the package's order: the values agree to the last bit.
    """

    LINE = np.arange(64)
    WIDE, NARROW = 2 * LINE / 3, LINE / 5 / 3
    FIELDS = {"start": (LINE / 3, LINE / 3, 8), "lakes": (LINE / 15, LINE / 15, 3),
              "ponds": (LINE / 5, LINE / 5, 3), "mountains": (LINE / 15, LINE / 15, 0),
              "rocks": (LINE / 5, LINE / 5, 0), "caves": (LINE / 7, LINE / 7, 6),
              "tunnels along x": (WIDE, NARROW, 7), "tunnels along y": (NARROW, WIDE, 7),
              "coal": (LINE / 8, LINE / 8, 1), "iron": (LINE / 6, LINE / 6, 2),
              "lava": (LINE / 5, LINE / 5, 6), "sand": (LINE / 9, LINE / 9, 4),
              "trees": (LINE / 7, LINE / 7, 5)}

    def __init__(self, seed):
        from opensimplex.internals import GRADIENTS3
        (x, y, z), self.fields = self.tables()
        shuffled = self.shuffle(seed)
        corner = shuffled[(shuffled[(shuffled[x] + y) % 256] + z) % 256]
        self.gradients = GRADIENTS3.reshape(-1, 3)[corner % 24].T.astype(np.float64)

    def __call__(self, name, cells=slice(None)):
        # parts: (8, number of cells); in place, because fresh memory costs as much as the sums
        corner, dx, dy, dz, weight = (part[:, cells] for part in self.fields[name])
        terms = self.gradients[0].take(corner)
        terms *= dx
        for gradient, offset in zip(self.gradients[1:], (dy, dz)):
            term = gradient.take(corner)
            term *= offset
            terms += term
        terms *= weight
        value = terms[0]
        for term in terms[1:]:  # terms.sum(0) might add in another order
            value += term
        return value / 103

    @staticmethod
    def shuffle(seed):
        """opensimplex's own shuffle of 0..255, which a seed stands for."""
        left, shuffled = list(range(256)), [0] * 256
        for i in range(-3, 256):
            seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
            if i >= 0:
                signed = seed - 2**64 if seed >= 2**63 else seed
                pick = (signed + 31) % (256 - i)
                shuffled[255 - i], left[pick] = left[pick], left[255 - i]
        return np.array(shuffled)

    @classmethod
    @functools.lru_cache(1)
    def tables(cls):
        """x, y, z of all corners, and {field: (corner, dx, dy, dz, weight)}, each (8, 4096).

        A point has 3 to 8 corners near enough; the weights of the others are 0.
        """
        from opensimplex import internals
        fields, points, asked = len(cls.FIELDS), [], []
        noise = getattr(internals._noise3, "py_func", internals._noise3)  # as it was before numba
        # the same function, but the one that it asks for each product writes down the question
        noise = types.FunctionType(noise.__code__, {
            **vars(internals), "_extrapolate3": lambda *question: asked.extend(question[2:]) or 0})
        for xs, ys, z in cls.FIELDS.values():
            for x, y in itertools.product(xs.tolist(), ys.tolist()):
                asked.clear()
                noise(x, y, z, None, None)
                points += asked + [9.0] * (8 * 6 - len(asked))  # too far away to count
        points = np.array(points).reshape(fields, 64 * 64, 8, 6).transpose(3, 0, 2, 1)
        x, y, z = points[:3].astype(np.intp) % 256
        corners, index = np.unique(256 * (256 * x + y) + z, return_inverse=True)
        dx, dy, dz = points[3:].copy()
        near = np.maximum(2 - dx * dx - dy * dy - dz * dz, 0)
        near *= near
        parts = index, dx, dy, dz, near * near
        return np.unravel_index(corners, (256,) * 3), dict(zip(cls.FIELDS, zip(*parts)))


@contextlib.contextmanager
def uniform_numbers(random, at_most):
    """Yield a function that returns what random.uniform() would return, only faster."""
    state = random.get_state()
    numbers = iter(random.random_sample(at_most).tolist())
    yield numbers.__next__
    random.set_state(state)
    random.random_sample(at_most - operator.length_hint(numbers))


@functools.lru_cache(4)
def crafter_textures(unit):
    """The package's pictures, one set for all games, and the ground's: (13, unit, unit, 3)."""
    from crafter import constants, engine
    textures = engine.Textures(constants.root / "assets")
    ground = [np.full((unit, unit, 3), 127, np.uint8)]  # outside of the island
    ground += [textures.get(name, (unit, unit))[..., :3] for name in constants.materials]
    return textures, np.stack(ground)


@functools.lru_cache(200)
def crafter_items(unit, inventory):
    """The package's picture of the inventory, (9 * unit, 2 * unit, 3). Nobody may change it."""
    from crafter import engine
    return engine.ItemView(crafter_textures(unit)[0], (9, 2))(dict(inventory), (unit, unit))


def crafter_env(name, **options):
    """`crafter:instructions` or `crafter:undirected`."""
    kinds = {"instructions": CrafterInstructions, "undirected": CrafterUndirected}
    if name not in kinds:
        raise ValueError(f"unknown environment {'crafter:' + name!r}; "
                         + nearest("crafter:" + name, [f"crafter:{kind}" for kind in kinds]))
    need("crafter", "crafter==1.8.3", "crafter:" + name)
    return kinds[name](**options)


class CrafterUndirected(World):
    """`crafter:undirected`: the game and its own reward, no instruction.

    Rules        See crafter's paper. +1 for a step with an achievement that is new in the episode,
                 and .1 per point of health won or lost.
    Observation  texture: the 9 x 7 tiles on the screen row by row, as numbers of CrafterGame.TILES
                 (by night too, when a person sees little), and once more the one that is faced,
                 which "do" is about: to find it by its direction is learned slowly;
                 vector: facing x, y; the 16 entries of the inventory / 10, health, food, drink and
                 energy first; (x - 30) / 60, (y - 30) / 60; daylight
    Actions      nothing, left, right, up, down, do (collect, hit, eat, drink), sleep, place stone,
                 table, furnace, plant, make wood, stone, iron pickaxe, wood, stone, iron sword
    Ends         terminated by death, truncated after 2000 steps as in the paper
    Options      obs=pixels: instead of the tiles an image, 64 x 64 x 3, the package's own, in which
                 nights are dark and noisy; horizon=n (crafter's own is 10000)
    Returns      random 1.37, best known 16.9 (a script that sees the whole island, and is killed
                 after some hundred steps), at most 22 and a little
    """

    RANDOM, BEST, needs = 1.37, 16.9, "memory"
    metadata, render_mode = {"render_modes": ["rgb_array"]}, "rgb_array"
    action_space = spaces.Discrete(17)
    keys = {".": 0, "a": 1, "d": 2, "w": 3, "s": 4, " ": 5, "z": 6, "r": 7, "t": 8, "f": 9, "p": 10,
            "1": 11, "2": 12, "3": 13, "4": 14, "5": 15, "6": 16}

    def __init__(self, /, **options):
        self.name = "crafter:undirected"
        check_options(self.name, options, ["horizon", "obs"])
        self.pixels, self.horizon, written = crafter_options(self.name, options)
        self.name = full_name(self.name, written)
        self.observation_space = spaces.Dict(crafter_spaces(self.pixels))
        self.references = {"random": self.RANDOM, "best": self.BEST} if self.horizon >= 2000 else {}
        self.game = CrafterGame()

    def draw(self, rng):
        self.game.reset(int(rng.integers(2**31 - 1)))

    def act(self, action):
        return self.game.step(int(action))[0], self.game.dead, {}

    def observe(self):
        return self.game.look(self.pixels)

    def render(self):
        return self.game.picture(360)


def crafter_options(name, options):
    """-> (pixels, horizon, the options as they are written in the canonical name)"""
    obs = options.get("obs", "texture")
    if obs not in ("texture", "pixels"):
        raise ValueError(f"option 'obs' of {name!r} must be texture or pixels, not {obs!r}")
    horizon = positive_int(name, "horizon", options.get("horizon", 2000))
    written = {**options, "obs": obs, "horizon": horizon}
    for key, default in (("obs", "texture"), ("horizon", 2000)):
        if written[key] == default:
            del written[key]
    return obs == "pixels", horizon, written


def crafter_spaces(pixels):
    """Of the observation without the instruction, by name."""
    low, high = np.zeros((2, 21), np.float32)
    low[:2], high[:2] = -1, 1            # facing
    high[2:18] = 0.9                     # inventory
    low[18:20], high[18:20] = -0.5, 0.55  # place
    high[20] = 1                         # daylight
    shown = ({"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)} if pixels else
             {"texture": spaces.Box(0, len(CrafterGame.TILES) - 1, (64,), np.uint8)})
    return {**shown, "vector": spaces.Box(low, high)}


class CrafterInstructions(Instructed):
    """`crafter:instructions`: do what an instruction says, step by step ([1] 5.2, App. C.5).

    Rules        Every episode has a new island and a new instruction. +1 for each goal reached, in
                 order. An achievement is reached when it is done, first time or not; travel when
                 the agent is less than 2 cells from the place (a straight line, after any step);
                 build when it places a stone there, with the same tolerance.
    Observation  as in CrafterUndirected; and the instruction
    Actions      as in CrafterUndirected
    Ends         terminated by death and with the last goal, truncated after 2000 steps
    Instruction  "collect wood", "defeat zombie", "eat cow", "make stone pickaxe", "place plant",
                 "wake up" and so on, all 22 achievements of the game; "travel to (10, 50)" and
                 "build at (30, 30)", the same as "go to" and "place stone at", for all places
                 with coordinates 0, 5 .. 60; x counts to the east and y to the south, the agent
                 starts at (32, 32). Three words per goal, from 38.
    Options      goals=n: 1 to n of them, n = 1..5 (5); obs and horizon as in CrafterUndirected
    Returns      random .09 (1.7 % of all episodes succeed); best at most (n + 1) / 2 on average:
                 7 % of the islands have no diamond, and nights are dangerous
                 Successes in the paper: 62 %, from pixels 54 %

    Drawn are: the number of goals uniformly, then each goal by SHARES, independently; for a journey
    first a radius r of 1 to 44, with chances that fall linearly, then (nearly) the farthest place
    within r of (32, 32). Waking up and building are never drawn; a person may type them, and
    hindsight learns them, because steps report them.
    """

    RANDOM, needs = 0.087, "memory, instructions"
    SHARES = {
        "collect sapling": .06, "collect wood": .06, "collect stone": .054, "collect drink": .051,
        "collect coal": .03, "collect iron": .03, "collect diamond": .015,
        "defeat skeleton": .04, "defeat zombie": .06, "eat cow": .07, "eat plant": .03,
        "make wood pickaxe": .045, "make wood sword": .045, "make stone pickaxe": .0225,
        "make stone sword": .0225, "make iron pickaxe": .0075, "make iron sword": .0075,
        "place furnace": .015, "place plant": .03, "place stone": .045, "place table": .06,
        "travel": .20}
    PLACES = [(x, y) for x in range(0, 61, 5) for y in range(0, 61, 5)]
    max_achieved = 4  # awake, and with the same action a stone placed, at a place, at a place
    action_space, keys = CrafterUndirected.action_space, CrafterUndirected.keys
    draws_instruction = True  # render() lists the goals, so nobody else has to

    def __init__(self, /, **options):
        name = "crafter:instructions"
        check_options(name, options, ["goals", "horizon", "instruction", "obs"])
        goals = goal_limit(name, options.get("goals", 5))
        self.pixels, self.horizon, written = crafter_options(name, options)
        written.pop("goals", None)
        if goals != 5:
            written["goals"] = goals
        self.texts = {numbers: text for text, numbers in CRAFTER_GOALS.items()}
        self.set_up(name, written, goals, 3, len(CRAFTER_WORDS), **crafter_spaces(self.pixels))
        self.references = {"best": (1 + goals) / 2}
        if self.fixed is not None:
            self.references = {"best": float(len(goal_list(self.fixed)))}
        elif (goals, self.horizon) == (5, 2000):
            self.references["random"] = self.RANDOM
        self.game = CrafterGame()

    def begin_world(self, rng, goals):
        self.game.reset(int(rng.integers(2**31 - 1)))
        if goals is None:
            goals = [self.draw_goal(rng) for _ in range(rng.integers(1, self.max_goals + 1))]
        return goals

    def draw_goal(self, rng):
        text = rng.choice(list(self.SHARES), p=list(self.SHARES.values()))
        if text == "travel":
            radius = rng.choice(np.arange(1, 45), p=np.arange(44, 0, -1) / 990)
            distance = np.hypot(*(np.array(self.PLACES) - 32).T)
            order = distance + rng.random(len(distance))
            within = distance <= radius
            # no place is nearer than 2.8
            i = np.argmax(np.where(within, order, 0)) if within.any() else np.argmin(order)
            text = "travel to ({}, {})".format(*self.PLACES[i])
        return CRAFTER_GOALS[text]

    def move(self, action):
        game = self.game
        _, earned = game.step(int(action))
        goals = [CRAFTER_GOALS[name.replace("_", " ")] for name in earned]
        x, y = game.player.pos.tolist()
        if "place_stone" in earned:
            across, down = game.player.facing
            goals += self.at_place("build at", x + across, y + down)
        return goals + self.at_place("travel to", x, y), game.dead

    @staticmethod
    def at_place(verb, x, y):
        """The goal of the place less than 2 cells away, as a list of one or none."""
        across, down = min(5 * round(x / 5), 60), min(5 * round(y / 5), 60)
        if (x - across) ** 2 + (y - down) ** 2 >= 4:
            return []
        return [CRAFTER_GOALS[f"{verb} ({across}, {down})"]]

    def look(self):
        return self.game.look(self.pixels)

    def parse_goal(self, text):
        place = re.fullmatch(r"(travel to|go to|build at|place stone at) "
                             r"\( ?(-?[0-9]{1,9}) ?, ?(-?[0-9]{1,9}) ?\)", text)
        if place:
            verb = place[1].replace("place stone", "build").replace("go to", "travel to")
            x, y = int(place[2]), int(place[3])
            text = f"{verb} ({x}, {y})"
            if text not in CRAFTER_GOALS:
                near = [clip(5 * round(v / 5), 0, 60) for v in (x, y)]
                problem = ("places have coordinates 0, 5, 10 .. 60" if {x, y} <= {*range(64)} else
                           f"({x}, {y}) is outside of the map, whose coordinates are 0 to 63")
                raise ValueError(f"{problem}; nearest to ({x}, {y}): {verb} ({near[0]}, {near[1]})")
        if text not in CRAFTER_GOALS:
            known = [goal for goal in CRAFTER_GOALS if "(" not in goal or "(30, 30)" in goal]
            raise ValueError(f"unknown goal {shorten(text)} in {self.name}; "
                             + nearest(text[:60], known))
        return CRAFTER_GOALS[text]

    def format_goal(self, goal):
        if tuple(goal) not in self.texts:
            raise ValueError(f"no goal of {self.name} has the numbers {tuple(goal)}")
        return self.texts[tuple(goal)]

    def render(self):
        """The package's picture above the goals: done ones ticked, the next one bright."""
        from PIL import Image, ImageDraw, ImageFont
        picture = Image.new("RGB", (360, 368 + 24 * self.max_goals))
        picture.paste(Image.fromarray(self.game.picture(360)))
        pen, font = ImageDraw.Draw(picture), ImageFont.load_default(18)
        for i, goal in enumerate(goal_list(self.instruction)):
            top, color = 364 + 24 * i, (255, 255, 255) if i == self.progress else (140, 140, 140)
            if i < self.progress:
                color = (90, 210, 90)
                pen.line([(10, top + 12), (15, top + 18), (25, top + 5)], color, 3)
            elif i == self.progress:
                pen.polygon([(12, top + 5), (12, top + 19), (22, top + 12)], color)
            pen.text((36, top), self.format_goal(goal), color, font)
        return np.array(picture)


CRAFTER_WORDS = ("", "collect", "defeat", "eat", "make", "place", "travel", "build", "wake", "up",
                 "coal", "diamond", "drink", "iron", "sapling", "stone", "wood", "skeleton",
                 "zombie", "cow", "plant", "pickaxe", "sword", "furnace", "table",
                 *map(str, range(0, 61, 5)))


def crafter_goals():
    """{text: three numbers of CRAFTER_WORDS} of all 360 goals."""
    texts = [text for text in CrafterInstructions.SHARES if text != "travel"] + ["wake up"]
    texts += [f"{verb} ({x}, {y})" for verb in ("travel to", "build at")
              for x, y in CrafterInstructions.PLACES]
    goals = {}
    for text in texts:
        words = re.sub(" to| at|[(,)]", "", text).split()
        goals[text] = tuple(CRAFTER_WORDS.index(word) for word in [*words, "", ""][:3])
    return goals


CRAFTER_GOALS = crafter_goals()


# ---- 12. Many environments side by side ------------------------------------------------------


class BrokenEnvironment(RuntimeError):
    """An environment broke its own contract; the message names environment, step and key."""


class Unrepeatable(BrokenEnvironment):
    """An episode cannot be brought back: the environment does not follow its seed."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message describes the batch."""


class OutOfMemory(RuntimeError):
    """There was not enough memory to go on."""

    def __init__(self, problem):
        super().__init__("too little memory (" + " ".join(str(problem).split())[:120] + "); take a"
                         " smaller --buffer-steps, --parallel-envs, --critics, --batch or --size")


def describe_batch(batch, loss, norm, updates):
    """One line on the batch that broke the loss: the ranges of its arrays."""
    arrays = {**batch["tokens"], **batch["tokens"]["obs"]}
    ranges = (f"{name} {tuple(x.shape)} {x.min().item():.3g} .. {x.max().item():.3g}"
              for name, x in arrays.items() if name != "obs")
    return (f"the loss is {loss.item()}, its gradient's norm {norm.item()} at update {updates}; the"
            " batch: " + ", ".join(ranges))


class Shard:
    """Environments that step one after the other in one process, every observation checked."""

    def __init__(self, name, seeds, first=0):
        self.name, self.first = name, first
        self.envs = [make_env(name, seed=seed) for seed in seeds]
        self.time = [0] * len(self.envs)
        self.actions = [[] for _ in self.envs]            # since the episode began

    def begin(self, i, options=None):
        """Reset environment i -> (first observation, env.episode)"""
        self.now = i
        observation, _ = self.envs[i].reset(options=options)
        self.time[i], self.actions[i] = 0, []
        self.check(i, observation)
        return observation, self.envs[i].episode

    def begin_all(self, skip=None):
        """skip: so many of each one's next episodes are left out"""
        for env, n in zip(self.envs, skip or ()):
            env.np_random.bit_generator.advance(n)
        return [self.begin(i) for i in range(len(self.envs))]

    def step(self, actions):
        """-> per environment (observation, reward, terminated, truncated, info, what begin gave if
        the episode ended, else None)"""
        results = []
        for i, (env, action) in enumerate(zip(self.envs, actions)):
            self.now = i
            self.time[i] += 1
            observation, reward, terminated, truncated, info = env.step(action)
            self.actions[i].append(action)
            self.check(i, observation)
            if not abs(reward) <= LARGEST:
                raise self.broken(i, f"the reward is {reward}")
            ended = terminated or truncated
            if not ended and self.time[i] >= env.horizon:
                raise self.broken(i, f"the episode goes on beyond its horizon of {env.horizon}")
            results.append((observation, reward, terminated, truncated, info,
                            self.begin(i) if ended else None))
        return results

    def state(self, _=None):
        """-> per environment, as plain data: its episode, the actions since it began, and the state
        of the generator that draws the next episodes"""
        return [(env.episode, np.array(actions).tolist(), env.np_random.bit_generator.state)
                for env, actions in zip(self.envs, self.actions)]

    def restore(self, states):
        """The inverse. BrokenEnvironment, whatever an environment raises: the file is all right."""
        for i, (episode, actions, generator) in enumerate(states):
            try:
                self.play_again(i, episode, actions)
            except Exception as problem:
                raise broken_by(problem, self) from problem
            self.envs[i].np_random.bit_generator.state = generator

    def play_again(self, i, episode, actions):
        """Begin this episode again in environment i, and take the same actions."""
        env = self.envs[i]
        self.begin(i, {"episode": episode})
        for action in actions:
            if not isinstance(env.action_space, spaces.Discrete):
                action = np.array(action, env.action_space.dtype)
            _, _, terminated, truncated, _ = env.step(action)
            self.time[i] += 1
            self.actions[i].append(action)
            if terminated or truncated:
                raise Unrepeatable(str(self.broken(
                    i, "the same episode and actions end earlier than before a checkpoint;"
                    " the environment does not follow its seed")))

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
            if x.dtype.kind == "f" and not np.abs(x).max(initial=0) <= LARGEST:  # NaN is not <=
                raise self.broken(i, f"observation {part!r} holds NaN, inf or more than {LARGEST:g}"
                                     f" in size: {one_line(x)}")

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
            with without_signals():
                process.start()
            theirs.close()                                # so that the pipe ends with the worker
            self.pipes.append(ours)
            self.processes.append(process)
            weakref.finalize(self, process.kill)          # it does not hear SIGTERM

    def send(self, command, arguments=None):
        """Start a Shard's `command`; arguments: one per environment, or None."""
        self.sent = command, arguments
        for pipe, part in zip(self.pipes, self.parts):
            with contextlib.suppress(BrokenPipeError):    # `receive` will notice
                pipe.send((command, None if arguments is None else arguments[part]))

    def receive(self):
        """-> what the command gave, a list with one entry per environment"""
        if not self.pipes:
            command, arguments = self.sent
            return getattr(self.shard, command)(arguments)
        results, wrong = [], None
        for pipe in self.pipes:
            try:
                result = pipe.recv()
            except (EOFError, ConnectionResetError):
                raise BrokenEnvironment("a worker process that steps environments died") from None
            if isinstance(result, Exception):
                wrong = wrong or result                   # all have to be heard, or some lag behind
            else:
                results += result or ()
        if wrong:
            raise wrong
        return results

    def call(self, command, arguments=None):
        self.send(command, arguments)
        return self.receive()

    def state(self):
        """-> what `restore` takes, one entry per environment; None if a worker is gone"""
        with contextlib.suppress(BrokenEnvironment):
            return self.call("state")

    def restore(self, states, skip):
        """Every environment as `state` found it -> []. Where that is not to be had (one broke then,
        or does not follow its seed), all begin anew, with none of their first `skip` episodes ->
        what begin_all gives. BrokenEnvironment if one fails meanwhile."""
        try:
            if states:
                self.call("restore", states)
                return []
        except Unrepeatable as problem:
            say(f"The rollouts under way are lost: {problem}")
        return self.call("begin_all", [skip] * self.parts[-1].stop)

    def close(self):
        """End the workers. Without it they end with their pipes, or with this process."""
        for pipe in self.pipes:
            pipe.close()
        self.pipes = []


@contextlib.contextmanager
def without_signals():
    """Ctrl-C and SIGTERM are ignored meanwhile, and by every process that is started: they reach a
    whole group of processes, and it is the parent that ends a run."""
    main = threading.current_thread() is threading.main_thread()     # only it may set handlers
    numbers = [signal.SIGINT, signal.SIGTERM] if main else []
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def serve(pipe, *arguments):
    """A worker's life: one Shard, commands in, results out, until the pipe is closed."""
    shard = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            command, argument = pipe.recv()
            try:
                shard = shard or Shard(*arguments)
                pipe.send(getattr(shard, command)(argument))
            except Exception as problem:
                pipe.send(broken_by(problem, shard, arguments[0], " (--workers 0 shows where)"))


def broken_by(problem, shard, name="", hint=""):
    """What an environment raised as a BrokenEnvironment of one line, or what it is already."""
    if isinstance(problem, (BrokenEnvironment, ModuleNotFoundError, UsageError)):
        return problem
    what = " ".join(f"{type(problem).__name__}: {problem}{hint}".split())
    return shard.broken(shard.now, what) if shard else BrokenEnvironment(f"{name}: {what}")


# ---- 13. What an agent must know of an environment --------------------------------------------


def each(function, x, *more):
    """To every leaf: each(len, {"a": "x", "b": {"c": ""}}) -> {"a": 1, "b": {"c": 0}}"""
    if not isinstance(x, dict):
        return function(x, *more)
    return {k: each(function, v, *(other[k] for other in more)) for k, v in x.items()}


class Recorded:
    """A function of tensors on a GPU, its kernels launched all at once as a CUDA graph: to start a
    thousand small ones takes the host five times as long as the GPU then works.

        recorded(inputs, *more) = function(inputs, *more),     inputs a nested dict of tensors

    Three calls in a row with inputs of the same shapes just run the function, the fourth records
    what it launches. Later ones run no Python: their inputs are copied over the recorded ones, and
    the same kernels start again, with the recorded `more`; the result is in the same tensors every
    time. So the function must not wait for the GPU, and all else that it reads or writes has to
    stay where it is in memory. Inputs of other shapes begin anew."""

    def __init__(self, function, usable):
        """usable: False = never record, as on a CPU"""
        self.function, self.usable = function, usable
        self.forget()

    def forget(self):
        """Give up the recording, and all memory that it worked in."""
        self.graph = self.inputs = self.result = self.shapes = None

    def plain(self, inputs, *more):
        """Just run it, and forget the recording: it may be long until its shapes come again."""
        self.forget()
        return self.function(inputs, *more)

    def __call__(self, inputs, *more):
        if not self.usable:
            return self.function(inputs, *more)
        import torch                                         # what is here has to run without it
        shapes = each(lambda x: x.shape, inputs)
        if shapes != self.shapes:
            result = self.plain(inputs, *more)
            self.shapes, self.alike = shapes, 1
            return result
        self.alike += 1
        if self.alike <= 3:
            return self.function(inputs, *more)
        if self.graph is None:
            self.inputs, self.more = each(torch.clone, inputs), more
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):                    # records, and runs nothing
                self.result = self.function(self.inputs, *more)
            self.graph = graph                               # not half of one, if that failed
        each(lambda mine, x: mine.copy_(x), self.inputs, inputs)
        self.graph.replay()
        return self.result


def set_up_memory():
    """Before anything is computed on a CPU: what the libraries below torch keep, and what not."""
    # oneDNN, which multiplies in bfloat16, writes code for every new shape, and it and torch keep
    # the last 1024 of these: gigabytes, where no two batches have as many steps (4.6 GB in Crafter
    # with size small, now 1.4). With 64, batches of one shape are as fast as before.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
    # glibc is to keep freed memory instead of handing it back to the kernel, which would have to
    # zero every page again: 7 % of a small update, 40 % of one with continuous actions.
    with contextlib.suppress(OSError, AttributeError):       # another C library: nothing to set
        ctypes.CDLL(None).mallopt(-3, 2**30)                 # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)             # M_TRIM_THRESHOLD


MOST_ACTIONS = 10_000  # every critic has an output for each of them and each discount factor


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
        if hasattr(env, "max_achieved"):
            parts["achieved"] = (env.max_achieved, parts["instruction"][1] - 1)
        action = env.action_space
        if isinstance(action, gymnasium.spaces.Discrete):
            parts.update(actions=int(action.n))
        elif isinstance(action, gymnasium.spaces.MultiDiscrete):
            nvec = tuple(int(n) for n in action.nvec)
            parts.update(actions=math.prod(nvec), nvec=nvec)
        else:
            parts.update(discrete=False, actions=action.shape[0])
        if parts["actions"] > MOST_ACTIONS:
            raise UsageError(f"{env.name} has {parts['actions']:,} actions, combinations counted; "
                             f"an agent takes at most {MOST_ACTIONS:,}")
        return Spec(horizon=int(env.horizon), **parts)

    def token_arrays(self, *shape):
        """Zeroed arrays for `shape` tokens. action, reward and done lie with the token that they
        led to, as the encoder reads them: action[t] here is action[t - 1] of a Trajectory."""
        obs = dict(vector=((self.vector,), np.float32), image=(self.image, np.uint8),
                   texture=(self.texture[:1], np.uint8),
                   instruction=(self.instruction[:2], np.int32))
        action = ((), np.int64) if self.discrete else ((self.actions,), np.float32)
        layout = dict(obs={name: obs[name] for name in obs if getattr(self, name)}, action=action,
                      reward=((), np.float32), done=((), bool), reset=((), bool))
        if self.achieved:
            layout["achieved"] = (self.achieved, np.int32)
        # np.zeros takes no memory before it is written to, so a large capacity costs nothing.
        return each(lambda part: np.zeros(shape + part[0], part[1]), layout)

    def to_env(self, action):
        """The agent's actions (N,) or (N, A) as a list of what each environment's step takes."""
        if not self.discrete:
            return list(action)
        if self.nvec:
            return list(np.stack(np.unravel_index(action, self.nvec), -1))
        return action.tolist()


# ---- 14. What a run leaves behind: log.csv, curve.png, eval.json, config.json -----------------

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


def in_column(x, width, how):
    """A number of the table, with a blank before it: where it is too long, with fewer decimals."""
    if math.isnan(x):
        return "-".rjust(width)
    texts = [format(x, form) for form in (how, ".1f", ".0f", ".1e", ".0e")]
    return next((text for text in texts if len(text) < width), texts[-1]).rjust(width)


class Log:
    """The files of one run, and the table on the console. Nothing is written before it is made."""

    def __init__(self, config, env, agent, writes=True):
        """agent: a line on it for the console; writes: False in all but the first of several
        processes."""
        self.config, self.env, self.writes = config, env, writes
        self.goal = stopping_return(config, env)
        self.rows, self.next_eval, self.restored = [], 0, False
        self.returns, self.sums, self.count = [], {}, 0       # since the last row
        self.clock = dict(acting=0.0, learning=0.0)           # seconds since the run began
        # A new run's first checkpoint follows its first evaluation, so that it can be resumed.
        self.saved_at = time.monotonic() if config.resume else -math.inf
        self.folder = (Path(config.resume or config.out) if config.resume or not writes
                       else output_folder(config))
        known = ", ".join(f"{name} {value:g}" for name, value in env.references.items()) or "?"
        until = f"return {self.goal:g} or " if self.goal < math.inf else ""
        self.header = (
            f"{env.name}: rollouts of at most {env.horizon} steps; mean return {known}\n"
            f"{agent}; until {until}{config.env_steps:,} env steps\n\n"
            + "".join(f"{title:>{width}}" for title, width, _, _ in COLUMNS.values()))
        self.bar = progress_bar(config.env_steps, self.writes)

    @contextlib.contextmanager
    def files(self, save):
        """Write everything that a run leaves, however the `with` block ends; save(the exception
        that ended it, or None) is called before the last files."""
        if self.writes:
            versions = {name: importlib.metadata.version(name)
                        for name in ("torch", "numpy", "gymnasium", "popgym", "crafter", "mujoco",
                                     "metaworld") if importlib.util.find_spec(name)}
            versions["python"] = sys.version.split()[0]
            git = subprocess.run("git describe --always --dirty --abbrev=40", shell=True, text=True,
                                 capture_output=True, cwd=Path(__file__).resolve().parent)
            options = dict(dataclasses.asdict(self.config), versions=versions,
                           commit=git.stdout.strip(), command=" ".join(sys.argv))
            try:
                self.claim_folder()
                self.json("config.json", options)
                self.csv()
            except OSError as problem:
                flag = "--resume" if self.config.resume else "--out"
                raise UsageError(f"{flag} {self.folder} cannot be written: {problem.strerror};"
                                 " choose another folder") from problem
            say(self.header)
        end = None
        try:
            yield
        except BaseException as problem:
            end = problem
            if without_memory(problem):
                raise OutOfMemory(problem) from problem
            raise
        finally:
            self.bar.close()
            try:
                save(end)
            finally:
                if self.rows and self.writes:
                    self.finish()

    def claim_folder(self):
        """Of runs that start at once, each gets its own. FileExistsError if --out is taken."""
        if self.config.resume and not self.restored:
            raise UsageError("resume: train(*parse_command_line(['--resume', DIR])) also loads it")
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                open(self.folder / "log.csv", "a" if self.config.resume else "x").close()
                return
            except FileExistsError:
                if self.config.out:
                    raise
                self.folder = output_folder(self.config)

    def reached_goal(self):
        return bool(self.rows) and self.rows[-1]["return_mean"] >= self.goal

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
        if info:                                              # of an update that was ended
            self.sums = {name: x + self.sums.get(name, 0.0) for name, x in info.items()}
            self.count += 1

    def row(self, score, env_steps, updates):
        """One evaluation: a row of log.csv and of the console's table."""
        last = self.rows[-1] if self.rows else dict(self.clock, env_steps=0, updates=0)
        if env_steps >= self.next_eval:
            self.next_eval = self.next_after(env_steps)
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
            say("".join(in_column(row.get(name, math.nan), width, how)
                        for name, (_, width, how, _) in COLUMNS.items()))

    def next_after(self, env_steps):
        """When the evaluation after one at `env_steps` is due."""
        # Where rollouts are long, an evaluation takes far more than 1000 steps itself.
        every = self.config.eval_every or max(1000, self.config.episodes * self.env.horizon // 4)
        return env_steps + max(every, env_steps // 10)

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
        when = (f" after {last['env_steps']:,} env steps, {last['updates']:,} updates,"
                f" {last['seconds']:.1f} s of training")
        say(f"\n{in_words(self.rows[-1], when)}\n"
            f"{self.folder}/: " + " ".join(name for name in (
                "log.csv", "curve.png", "eval.json", "config.json", "checkpoint.pt")
                if (self.folder / name).exists()))

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
        vars(self).update(state, restored=True)
        if self.rows:      # --eval-every may be a smaller one now, and counts from the last row on
            self.next_eval = min(self.next_eval, self.next_after(self.rows[-1]["env_steps"]))


def progress_bar(total, shown=True, **more):
    """For people who wait at a terminal; elsewhere nothing is shown."""
    return tqdm(total=total, unit=" steps", leave=False, dynamic_ncols=True,
                disable=None if shown else True, **more)


def say(text):
    """A line on the console, above the progress bar. When it cannot be written, as the reader has
    gone in `| head -1`, all that follows is dropped and the run goes on."""
    try:
        tqdm.write(text)
        print(end="", flush=True)    # unlike sys.stdout.flush(), also where there is no stdout
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stopping_return(config, env):
    """The mean return at which training stops; inf if it goes on until --env-steps."""
    if config.target_return == "auto" and env.max_return is not None:
        return env.max_return - 0.01 * abs(env.max_return)
    return math.inf if config.target_return in ("auto", "none") else float(config.target_return)


def summary(trajectories):
    """-> dict(return_mean, return_std, success, episodes, inner_returns, goals), see evaluate.

    inner_returns: the mean return of the first, second, ... inner episode.
    goals: for the first, second, ... goal of an instruction (share of the inner episodes that ask
    for it and do it, their mean number of steps until it is done); a step that does one is paid 1.
    """
    returns = [float(trajectory.reward.sum()) for trajectory in trajectories]
    success = np.array([trajectory.success for trajectory in trajectories])
    if not np.isnan(success).all():                    # some environments name successes alone
        success = np.nan_to_num(success)
    starts = [[0, *1 + np.flatnonzero(x.reset[1:-1])] for x in trajectories]
    rewards = [np.split(x.reward, begin[1:]) for x, begin in zip(trajectories, starts)]
    inner = itertools.zip_longest(*([part.sum() for part in parts] for parts in rewards),
                                  fillvalue=math.nan)
    asked = [int(np.count_nonzero(x.obs["instruction"][t, :, 0])) if "instruction" in x.obs else 0
             for x, begin in zip(trajectories, starts) for t in begin]
    done, goals = [np.flatnonzero(part) + 1 for parts in rewards for part in parts], []
    for k in range(max(asked)):
        steps = [times[k] for times in done if len(times) > k]
        goals.append((len(steps) / sum(n > k for n in asked),
                      float(np.mean(steps)) if steps else math.nan))
    return dict(return_mean=float(np.mean(returns)), return_std=float(np.std(returns)),
                success=float(np.mean(success)), episodes=len(returns),
                inner_returns=[float(np.nanmean(x)) for x in inner], goals=goals)


def in_words(score, when=""):
    """'return 0.998 +- 0.01 over 64 episodes', and what else `summary` found."""
    text = (f"return {score['return_mean']:.3f} +- {score['return_std']:.3f} over"
            f" {score['episodes']} episodes")
    if not math.isnan(score["success"]):
        text += f", success {score['success']:.3f}"
    if len(score["inner_returns"]) > 1:
        text += ", inner episodes " + " ".join(f"{x:.3g}" for x in score["inner_returns"][:10])
        text += " ..." * (len(score["inner_returns"]) > 10)
    text += when
    for k, (share, steps) in enumerate(score["goals"], start=1):
        text += f"\n  goal {k}: done in {share:.3f} of the episodes that ask for it"
        text += f", after {steps:.1f} steps on average" if share else ""
    return text


def output_folder(config):
    """--out, or the first free one of runs/<env>-<seed>, runs/<env>-<seed>-2, ...

    Raises UsageError if --out holds a run already: nobody's run is ever overwritten.
    """
    out = Path(config.out)
    files = ("log.csv", "checkpoint.pt")     # a name too long for a file does not exist either
    if config.out and any(os.path.exists(out / x) for x in files):
        raise UsageError(f"--out {out} already holds a run; choose another folder")
    if not next(path for path in (out, *out.parents) if os.path.exists(path)).is_dir():
        raise UsageError(f"--out {out} cannot be a folder: there is a file in its place")
    env = re.sub("[^A-Za-z0-9.]+", "-", config.env)[:200].strip("-")  # file systems take 255 bytes
    stem = f"runs/{env}-{config.seed}"
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
    steps, with everything consistent. One more, at least a second later (torchrun passes on the
    Ctrl-C that every process had already), interrupts at once."""
    caught, first = threading.Event(), []

    def handler(number, frame):
        if first and time.monotonic() > first[0] + 1:
            raise KeyboardInterrupt
        first.append(time.monotonic())
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
        say(f"not written: {problem}; training goes on, the last checkpoint is intact")


# ---- 15. A command line from a dataclass ------------------------------------------------------


def option(default, help, choices=None, low=-1e12, high=10**12, words=(), free=False):
    """A Config field: its default, its help text, what it may be (one of choices; low..high, within
    what arrays can count; words or, as text, a number), and whether it is free to change when a run
    is resumed."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, low=low, high=high, words=words, free=free))


def check_options_of(config):
    """UsageError if a field of the dataclass `config` breaks the rule that `option` gave it. Lists
    become tuples."""
    for field in dataclasses.fields(config):
        flag, value, rule = flag_of(field.name), getattr(config, field.name), field.metadata
        if isinstance(field.default, tuple):
            setattr(config, field.name, tuple(value))
            if not len(value):
                raise UsageError(f"{flag} needs at least one number")
            for x in value:
                check_value(flag, x, field.default[0], rule)
        elif rule["words"]:
            setattr(config, field.name, str(value))
            check_number_or_word(flag, str(value), rule["words"])
        else:
            check_value(flag, value, field.default, rule)


def check_compiler():
    """UsageError if what torch.compile needs is not there: a C++ compiler, Python's headers. Its
    advice on a GPU, to round products to three digits, is silenced."""
    warnings.filterwarnings("ignore", r"\s*(TensorFloat32|Online softmax)")
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if not shutil.which(compiler := os.environ.get("CXX", usual)):
        raise UsageError(f"--compile needs a C++ compiler, and {compiler} is not here; install it,"
                         " or name another in the environment variable CXX")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise UsageError("--compile needs Python's headers, and Python.h is not here; install"
                         " python3-dev")


KINDS = {bool: (bool, "on or off"), int: (numbers.Integral, "a whole number"),
         float: (numbers.Real, "a number"), str: (str, "text")}


def check_value(flag, x, default, rule):
    """UsageError if x is not of the default's kind, none of the choices, or out of range."""
    kind, name = KINDS[type(default)]
    if not isinstance(x, kind) or isinstance(x, bool) != isinstance(default, bool):
        raise UsageError(f"{flag} {shorten(repr(x))[1:-1]} is not {name}")
    if rule["choices"] and x not in rule["choices"]:
        raise UsageError(f"{flag} {x!r} is not one of {', '.join(rule['choices'])}; "
                         + nearest(x, rule["choices"]))
    if not isinstance(x, str) and not rule["low"] <= x <= rule["high"]:      # NaN is not, either
        limit = rule["high"] if x > rule["low"] else rule["low"]
        raise UsageError(f"{flag} {shorten(str(x))[1:-1]} is out of range {rule['low']:g} .."
                         f" {rule['high']:g}; the nearest limit is {limit}")


def check_number_or_word(flag, text, words):
    with contextlib.suppress(ValueError):
        if text in words or math.isfinite(float(text)):
            return
    raise UsageError(f"{flag} {text!r} is neither a number nor {' nor '.join(words)}")


def flag_of(name):
    return "--" + name.replace("_", "-")


def changed_options(config, given):
    """A copy of `config` with the fields in `given`, {name: value}. UsageError for one that is not
    free to change when a run is resumed."""
    free = [field.name for field in dataclasses.fields(config) if field.metadata["free"]]
    changed = dataclasses.replace(config, **given)        # which also brings values into one form
    for name in given:
        if name not in (*free, "resume") and getattr(changed, name) != getattr(config, name):
            raise UsageError(f"{flag_of(name)} may not change on --resume (the run has"
                             f" {getattr(config, name)!r}); these may: "
                             + ", ".join(map(flag_of, free)))
    return changed


def check_processes(folder, number):
    """UsageError unless this job has as many processes as the run in `folder`; an agent whose run
    was thrown away has none."""
    if number != int(os.environ.get("WORLD_SIZE", 1)):
        raise UsageError(f"{folder} was trained by " + (
            f"{number} processes; resume it with as many" if number else
            "others: its agent alone was kept"))


class Parser(argparse.ArgumentParser):
    """argparse that complains in one line, with the nearest valid flag."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        # What begins with "-" is a number if it looks like one: argparse does not know -1e3 and -1.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.I)

    def error(self, message):
        flags = self._option_string_actions
        unknown = re.match(r"unrecognized arguments: ([^ =]+)", message)
        if unknown:
            word = unknown[1]
            hint = nearest("--" + word.strip("-"), flags)
            if ":" in word and "--env" in flags:
                hint = f"write --env {word}"
            message = f"unknown option {word}; {hint}"
        missing = re.match(r"argument (--[a-z-]+): expected", message)
        if missing:
            action = flags[missing[1]]
            default = " ".join(map(str, np.atleast_1d("" if action.default is None
                                                      else action.default)))
            kind = action.metavar or action.dest.upper()
            value = kind if "|" in kind else default or kind
            message += f"; such as {missing[1]} {value}"
        raise UsageError(" ".join(message.split()))


def whole_number(text):
    """'1000', '1_000' or '1e3' -> 1000"""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError, OverflowError):
        if float(text) == int(float(text)):
            return int(float(text))
    raise argparse.ArgumentTypeError(f"{shorten(text)} is not a whole number")


def read_command_line(kind, program, argv=None):
    """One flag per field of the dataclass `kind` -> {field: value}, and only those written down."""
    parser = Parser(prog=program,
                    description="AMAGO: in-context reinforcement learning in one file.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    fields = dataclasses.fields(kind)
    for field in fields:
        value, rule = field.default, field.metadata
        of = type(value[0] if isinstance(value, tuple) else value)
        how = dict(type=whole_number if of is int else of,
                   metavar={int: "INT", float: "NUMBER", str: "TEXT"}.get(of))
        if isinstance(value, tuple):
            how.update(nargs="+")
        elif of is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif rule["choices"]:
            how.update(metavar="|".join(rule["choices"]))
        parser.add_argument(flag_of(field.name), default=value, help=rule["help"], **how)
    argv = sys.argv[1:] if argv is None else list(argv)
    # Into a namespace that has a value for each already, argparse writes no defaults.
    blank = argparse.Namespace(**{field.name: None for field in fields})
    written = vars(parser.parse_args(argv, blank))
    given = {name: value for name, value in written.items() if value is not None}
    for name, value in given.items():
        if value == "":
            raise UsageError(f"{flag_of(name)} is empty; give a value (was a variable of the shell"
                             f" unset?) or leave {flag_of(name)} out")
    return {field.name: given.get(field.name, field.default) for field in fields}, given


def check_together(given):
    """UsageError for options beside --eval that say nothing to it, or without it only to it."""
    alone, with_eval = {"render", "instruction"}, {"eval", "episodes", "seed", "device", "threads"}
    wrong = given.keys() - alone - with_eval if "eval" in given else given.keys() & alone
    if wrong:
        how = "does not go with" if "eval" in given else "goes with"
        raise UsageError(f"{flag_of(min(wrong))} {how} --eval FOLDER")


def without_memory(problem):
    """Whether an exception says that there is no memory: numpy's or torch's, on a CPU or a GPU."""
    if isinstance(problem, (BrokenEnvironment, NonFiniteLoss, OutOfMemory)):      # what we say
        return False
    return isinstance(problem, MemoryError) or isinstance(problem, RuntimeError) and bool(
        re.search("can't allocate memory|not enough memory|out of memory", str(problem)))


@contextlib.contextmanager
def blame(path):
    """Whatever goes wrong inside this `with` block is the fault of the file: any byte of it may be
    wrong, or it is a file of something else."""
    try:
        yield
    except Exception as problem:
        if isinstance(problem, BrokenEnvironment) or without_memory(problem):
            raise
        raise UsageError(f"{path} is damaged, or no checkpoint: {type(problem).__name__}") from None


def read_archive(path, version, load):
    """-> load(), the dict that a zip file holds. UsageError if there is no such file, if it is
    damaged or its members carry file attributes (torch looks at neither), or of another version."""
    if not os.path.exists(path):                             # nor does a name that is too long
        raise UsageError(f"{path} is not there; give a folder that a training run wrote")
    with blame(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() or any(member.external_attr for member in archive.infolist()):
                raise ValueError("wrong checksum")
        state = load()
        if type(found := state["version"]) is not int:
            raise TypeError
    if found != version:
        raise UsageError(f"{path} has version {found}, this program reads {version}")
    return state


def write_atomically(path, write):
    """write(file): whatever happens meanwhile, `path` holds either what it held or what that
    wrote. OSError if it cannot be written."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:               # torch turns the one into the other
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: {problem}") from problem


def no_device(name, gpus, own):
    """The error for a --device that is not here. gpus: how many are; own: whether it is this
    process's own under torchrun: others have another, so each has to complain for itself."""
    there = ", ".join(["cpu"] + [f"cuda:{i}" for i in range(gpus)])
    return (MachineError if own and gpus else UsageError)(
        f"--device {name!r} is not here; there is {there}")


def exit_code(program, work, lost=lambda problem: False):
    """work() -> exit code: 0 done, 1 the run broke (state saved), 2 bad arguments, 130 Ctrl-C
    (saved); what went wrong is one line on stderr. lost(problem): whether it is that another
    process of this job ended."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0     # of several processes of this machine
    try:
        work()
    except (UsageError, ModuleNotFoundError) as problem:
        if first or isinstance(problem, MachineError):
            print(f"{program}: {problem}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError, MemoryError) as problem:
        if lost(problem):
            problem = "another process of this job ended"
        elif without_memory(problem):                     # before anything was written: see files
            print(f"{program}: {OutOfMemory(problem)}", file=sys.stderr)
            return 2
        elif not isinstance(problem, (NonFiniteLoss, BrokenEnvironment, OutOfMemory, OSError)):
            raise
        print(f"{program} stopped: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as saved:
        print(f"{program}: interrupted", *saved.args, sep="; ", file=sys.stderr)
        return 130
    return 0


# ---- 16. The list --------------------------------------------------------------------------

# A new suite is one more function (name, **options) -> gymnasium.Env in this table.
SUITES = {"popgym": popgym_env, "gym": gym_env, "meta": meta_env, "darkkey": DarkKey,
          "tmaze": TMaze, "wind": Wind, "cheetah": cheetah_env, "metaworld": metaworld_env,
          "maze": Maze, "delivery": Delivery, "crafter": crafter_env}


def list_envs():
    """Yield (name, explanation) for everything that can be built here and now."""
    for name in popgym_names():
        yield name, POPGYM[split_difficulty(name.removeprefix("popgym:"))[0]][-1]
    yield "gym:CartPole-v1", "any gymnasium id; ?horizon=n and the environment's own options"
    yield "meta:gym:CartPole-v1?episodes=2", "k episodes of one task in one rollout, any name"
    yield "darkkey:9x9", "find a hidden key, then a hidden door, again and again; any size"
    yield "darkkey:8x8?fixed_start=true", "the same, always from the corner"
    yield "tmaze:100", "at the end of a corridor, turn as the first observation said; any length"
    yield "wind:", "hold a place against an unknown wind"
    if importlib.util.find_spec("mujoco"):
        yield "cheetah:vel", "run at a hidden speed, 3 episodes of 200 steps"
    if importlib.util.find_spec("metaworld"):
        yield "metaworld:reach?episodes=2", "a robot arm and a hidden goal, any of ML1's 50 tasks"
        yield "metaworld:ML45?episodes=2", "45 classes of such tasks"
    for size in ("7x7", "15x15", "31x31"):
        yield f"maze:{size}", "visit cells of a new maze in order; ?goals=5&rewired=1&position=0"
    yield "delivery:30", "deliver packages along a road of forks, in order; any length"
    if importlib.util.find_spec("crafter"):
        yield "crafter:instructions", "follow an instruction on an island; ?goals=3&obs=pixels"
        yield "crafter:undirected", "survive there and do as many different things as possible"


def describe(name):
    """One row of the table, as {column: text}."""
    env = make_env(name)
    known = {key: f"{value:.3f}" for key, value in env.references.items()}
    return {"name": env.name, "observation": space_text(env.observation_space),
            "action": space_text(env.action_space), "horizon": str(env.horizon),
            **{key: known.get(key, "-") for key in ("random", "best", "paper")},
            "needs": env.needs or "-"}


def space_text(space):
    """'vector 4', 'one of 5', 'image 64x64x3 + vector 21'"""
    if isinstance(space, spaces.Dict):
        return " + ".join(f"{key} " + "x".join(map(str, part.shape))
                          if key in ("instruction", "texture") else space_text(part)
                          for key, part in space.items())
    if isinstance(space, spaces.Box):
        return ("image " if is_image(space) else "vector ") + "x".join(map(str, space.shape))
    sizes = [space.n] if isinstance(space, spaces.Discrete) else space.nvec
    return "one of " + "x".join(map(str, sizes))


def steps_per_second(name, seconds=0.1):
    """Of random actions in this process, resets included, as text."""
    env = make_env(name, seed=0)
    actions = itertools.cycle([env.action_space.sample() for _ in range(1000)])
    env.reset()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for action in itertools.islice(actions, 100):
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        steps += 100
    return f"{steps / (time.perf_counter() - start):,.0f}"


def play(env, seed=None):
    """A person acts with the keyboard, or a pipe does: `echo wwd | python envs.py NAME --play`."""
    keys = getattr(env, "keys", {})
    if not keys and isinstance(env.action_space, spaces.Discrete) and env.action_space.n <= 10:
        keys = {str(action): action for action in range(env.action_space.n)}
    if not keys:
        raise UsageError(f"{env.name} has no keys to play it with: its actions are "
                         f"{space_text(env.action_space)}")
    verbs = getattr(getattr(env, "game", None), "actions", {})  # crafter's own words
    names = ", ".join(("space" if key == " " else key) + (f" {verbs[action]}" if verbs else "")
                      for key, action in keys.items())
    arrows = " (or arrows)" if {*"wad"} <= {*keys} else ""
    observation, _ = env.reset(seed=seed)
    show_to_person(env, observation, f"keys: {names}{arrows}; q quits")
    total = steps = 0
    while typed := read_keys():
        for key in typed:
            if key == "q":
                return
            if key not in keys:
                continue
            observation, reward, terminated, truncated, info = env.step(keys[key])
            total, steps = total + reward, steps + 1
            show_to_person(env, observation, f"step {steps} of at most {env.horizon}: "
                           f"key {key!r}, reward {reward:g}, return {total:g}")
            if terminated or truncated:
                won = f", success {info['success']:g}" if "success" in info else ""
                print(f"the end: return {total:g}{won}")
                return


def show_to_person(env, observation, message):
    """On the terminal: a picture if there is one, goals, and a line."""
    if sys.stdout.isatty():
        print("\x1b[2J\x1b[H", end="")  # clear the screen
    if env.render_mode == "rgb_array":
        columns, lines = shutil.get_terminal_size()
        print(half_blocks(env.render(), columns, 2 * (lines - 4)))
    else:
        print(observation)
    world = env.inner if isinstance(env, Meta) else env
    if hasattr(world, "checklist"):
        print(world.checklist())
    print(message, flush=True)


def half_blocks(picture, width, height):
    """A picture for a terminal: each character shows two pixels, one above the other."""
    scale = min(width / picture.shape[1], height / picture.shape[0], 1.0)
    for axis in (0, 1):  # mean colours of the pixels that fall together
        size = max(2, int(picture.shape[axis] * scale)) // 2 * 2
        edges = np.arange(size) * picture.shape[axis] // size
        counts = np.diff([*edges, picture.shape[axis]])
        picture = np.add.reduceat(picture, edges, axis=axis, dtype=np.float64)
        picture /= counts.reshape((-1, 1, 1) if axis == 0 else (-1, 1))
    upper, lower = picture[::2].astype(int).tolist(), picture[1::2].astype(int).tolist()
    return "\n".join("".join(
        "\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*above, *below)
        for above, below in zip(*rows)) + "\x1b[0m" for rows in zip(upper, lower))


def read_keys():
    """What was typed since the last call, arrows as w, a, s, d; '' at the end of a pipe."""
    if not sys.stdin.isatty():
        return sys.stdin.read()
    import termios  # terminals of Linux and macOS
    import tty
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)  # keys arrive without Enter
        typed = os.read(sys.stdin.fileno(), 100).decode(errors="replace")
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
    for code, letter in zip("ABCD", "wsda"):
        typed = typed.replace(f"\x1b[{code}", letter)
    return typed


def print_card(name):
    """All about one environment."""
    row, about = describe(name), dict(list_envs()).get(name)
    row["steps/s"] = steps_per_second(name)
    for key, text in {**row, **({"about": about} if about else {})}.items():
        print(f"{key:13}{text}")


def print_table():
    """All environments, each as soon as its speed is measured."""
    rows = [describe(name) for name in dict(list_envs())]
    rows.insert(0, {column: column for column in rows[0]})
    widths = {column: max(len(row[column]) for row in rows) for column in rows[0]}
    for row in rows:  # words to the left, numbers to the right
        words = ("name", "observation", "action", "needs")
        cells = [text.ljust(widths[column]) if column in words else text.rjust(widths[column])
                 for column, text in row.items()]
        slow = row["name"].startswith("metaworld:ML45")  # half a minute to build
        speed = "steps/s" if row is rows[0] else "-" if slow else steps_per_second(row["name"])
        print(*cells, speed.rjust(9), sep="  ", flush=True)
    print("\nhorizon: longest rollout; random, best, paper: mean returns of uniform actions, of the"
          " best policy known (or a bound), of AMAGO in its paper;\nneeds: what it takes that plain"
          " RL lacks; steps/s: of uniform actions here and now, resets included, measured for .1 s")


def main(arguments=None):
    """-> exit code: 0 done, 1 the environment is broken, 2 bad arguments, 130 Ctrl-C."""
    parser = Parser(prog="envs.py", description="The table of all environments, or one's card.")
    parser.add_argument("name", nargs="?", help="for example popgym:RepeatPrevious")
    parser.add_argument("--instruction", metavar="TEXT", help="for example 'go to (1, 1), go to "
                        "(3, 5)'")
    parser.add_argument("--play", action="store_true", help="play it yourself, with the keyboard")
    parser.add_argument("--seed", type=whole_number, metavar="INT", help="of the episode to play")
    try:
        options = parser.parse_args(arguments)
        if options.name == "":
            raise UsageError("the name is empty; python envs.py lists them all")
        if (options.seed or 0) < 0:
            raise UsageError(f"--seed {options.seed} is below 0; the nearest limit is 0")
        if not options.name and (options.play or options.instruction is not None):
            raise UsageError("--play and --instruction need the name of an environment")
        if options.seed is not None and not options.play:
            raise UsageError("--seed goes with --play")
        if options.instruction is not None:
            options.name = fix_instruction(options.name, options.instruction)
        if options.play:
            play(make_env(options.name), options.seed)
        elif options.name:
            print_card(make_env(options.name).name)
        else:
            print_table()
    except (UsageError, BrokenEnvironment, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, BrokenEnvironment) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # python envs.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
