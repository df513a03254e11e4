"""Hindsight relabeling, from one rollout to learning; and --hide-plan, --memory. About 30 seconds.

`RELABEL_WALKS=5000 pytest tests/test_relabel.py -k walk` tries thousands of walks per world.
"""

import copy
import functools
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

import amago_min as am
import envs
from envs import ACTIVE, DONE, NO_GOAL, WAITING
from probes import Memory, Probe, Run, use

WALKS = int(os.environ.get("RELABEL_WALKS", 60))       # per world and test
FUZZ = settings(max_examples=WALKS, deadline=None, database=None, derandomize=True)
WORLDS = ["maze:5x5", "maze:7x7?goals=1", "maze:7x7?goals=5&rewired=true", "delivery:11",
          "crafter:instructions?horizon=40"]
make_env = functools.cache(envs.make_env)


def goals_of(trajectory):
    """The instruction (K, W) without its statuses."""
    return trajectory.obs["instruction"][0, :, 1:]


def walk(env, episode, actions, instruction=None, world=()):
    """Play these actions until the rollout ends, in a plain loop -> Trajectory.

    world: attributes of the environment to set after its reset.
    """
    given = {} if instruction is None else {"instruction": instruction}
    observation, _ = env.reset(options={"episode": episode, **given})
    vars(env).update(world)
    obs, action, reward, reached, end = [observation], [], [], [], False
    for a in actions:
        if not end:
            a = env.drop if a == "drop" else int(a)
            observation, r, terminated, truncated, info = env.step(a)
            reached.append(np.zeros((env.max_achieved, env.words), np.int32))
            reached[-1][:len(info["achieved"])] = info["achieved"]
            obs.append(observation)
            action.append(a)
            reward.append(r)
            end = terminated or truncated
    T = len(action)
    return am.Trajectory({part: np.stack([x[part] for x in obs]) for part in obs[0]},
                         np.array(action), np.float32(reward), (np.arange(T) == T - 1) & end,
                         np.arange(T + 1) == 0, np.stack(reached), info.get("success", 0.), episode)


def random_walk(env, length, seed):
    """At most `length` random actions; those that drop a package know how, or none would arrive."""
    rng = np.random.default_rng(seed)
    choices = range(env.action_space.n)
    if env.name.startswith("delivery"):
        choices = [env.FORWARD, env.FORWARD, env.LEFT, env.RIGHT, "drop"]
    return walk(env, seed, [choices[i] for i in rng.integers(len(choices), size=length)])


def follow(env, instruction, reached):
    """The rule of the environment, step by step until all goals are done. reached (T, M, W)
    -> rewards, and what is seen of the instruction before every step and after the last"""
    reward, shown, progress = [], [env.show(instruction, 0)], 0
    for goals in reached:
        if progress < (instruction[:, 0] != 0).sum():
            r, progress = env.reward(instruction, progress, goals)
            reward.append(r)
            shown.append(env.show(instruction, progress))
    return np.float32(reward), np.stack(shown)


def letters(instruction, reached):
    """A made-up rollout: what was asked and what each step reached, such as "ACD" and ["B", "DE"].
    Words are 1 = A, 2 = B, ...; -> (T, M, 1) and so on, the environment's rule is followed."""
    word = " ABCDEFGHIJKLMNOPQRSTUVWXYZ".index
    asked = np.array([[word(x)] for x in instruction], np.int32)
    steps = np.zeros((len(reached), max(map(len, reached)) or 1, 1), np.int32)
    for t, goals in enumerate(reached):
        steps[t, :len(goals), 0] = [word(x) for x in goals]
    reward, shown = follow(envs.Instructed, asked, steps)
    T, over = len(reward), (shown[-1, :, 0] % DONE == 0).all()
    return am.Trajectory(
        dict(vector=np.arange(T + 1, dtype=np.float32)[:, None], instruction=shown), np.arange(T),
        reward, (np.arange(T) == T - 1) & over, np.arange(T + 1) == 0, steps[:T], float(over))


def made_up_walk(length, seed):
    """Letters at random: 1 to 4 goals in up to 2 more slots, each of which a step often reaches."""
    rng = np.random.default_rng(seed)
    asked = "".join(rng.choice(list("ABCD"), rng.integers(1, 5))) + " " * rng.integers(3)
    number = rng.integers(4, size=length)
    return letters(asked, ["".join(rng.choice(list("ABC"), n)) for n in number])


def text(trajectory):
    """The inverse of letters, of the instruction."""
    return "".join(" ABCDEFGHIJKLMNOPQRSTUVWXYZ"[x] for x in goals_of(trajectory)[:, 0])


def relabel(env, trajectory, seed, scheme="some", rarity=None):
    rng = np.random.default_rng(seed) if isinstance(seed, int) else seed
    return am.relabel(trajectory, env.reward, env.show, rng, scheme, rarity)


def rarity_of(trajectory):
    rarity = envs.GoalRarity()
    rarity.update(trajectory.achieved)
    return rarity


def parts(trajectory):
    """Every array and number in a Trajectory, by name."""
    return dict(vars(trajectory), **trajectory.obs)


def far_from(counts, shares):
    """How many standard deviations (of chi-square) counts are from their expected shares."""
    counts, shares = np.array(counts), np.array(shares)
    expected, freedom = counts.sum() * shares / shares.sum(), len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


# ---- invariants (T16) ----


def explains(goals, real, others, reached, t=-1):
    """Is each of `goals` met after the one before it: a real one at its own step, of which `real`
    has [(step, goal)] in order, any other at one of the steps `others`?"""
    if not goals:
        return not real
    if real and real[0][1] == goals[0] and real[0][0] > t and explains(
            goals[1:], real[1:], others, reached, real[0][0]):
        return True
    later = next((s for s in others if s > t and goals[0] in reached[s].tolist()), None)
    return later is not None and explains(goals[1:], real, others, reached, later)


def check(env, old, scheme, seed, rarity):
    """Relabel `old` and look at everything that must hold. -> the relabeled one"""
    before = copy.deepcopy(old)
    for x in (*vars(old).values(), *old.obs.values()):
        if isinstance(x, np.ndarray):
            x.flags.writeable = False
    new = relabel(env, old, seed, scheme, rarity)
    np.testing.assert_equal(parts(old), parts(before))                           # (h)
    T, goals, asked = len(new), goals_of(new), goals_of(old)
    k = (asked[:, 0] != 0).sum()
    assert 0 < T <= len(old)                                                     # (d)
    # What is asked: K slots and k goals as before, first those that can be met, then the old ones.
    assert goals.shape == asked.shape and goals.dtype == asked.dtype
    assert ((goals[:, 0] != 0) == (np.arange(len(goals)) < k)).all()             # (f)
    done = np.flatnonzero(old.reward).tolist()
    n, others = len(done), [t for t in range(len(old))
                            if old.achieved[t].any() and t not in done]
    real, most = list(zip(done, asked.tolist())), min(k - n, len(others))
    possible = [h for h in range(most + 1) if (goals[n + h:] == asked[n + h:]).all()
                and explains(goals[:n + h].tolist(), real, others, old.achieved)]
    assert {"none": 0 in possible, "some": possible, "all": most in possible}[scheme]
    # What happened stays; what is earned and seen follows the environment's rule.
    kept = dict(dict(old.obs, action=old.action, reset=old.reset, achieved=old.achieved))
    for name, x in kept.items():
        if name != "instruction":                                                # (g)
            here = T + 1 if name in old.obs or name == "reset" else T
            np.testing.assert_array_equal(parts(new)[name], x[:here], name)
    reward, shown = follow(env, goals, old.achieved)
    np.testing.assert_array_equal(new.reward, reward)                            # (b), (d), (e)
    np.testing.assert_array_equal(new.obs["instruction"], shown)
    over = reward.sum() == k
    np.testing.assert_array_equal(new.done, old.done[:T] | (over & (np.arange(T) == T - 1)))
    assert new.success == float(over)
    tokens = new.tokens()
    np.testing.assert_array_equal(tokens["reward"], np.append(0, reward))        # (c)
    if scheme == "none" or (goals == asked).all():
        np.testing.assert_equal(parts(new), parts(old))                          # (a)
    return new


SCHEMES = [(scheme, rare) for scheme in ("none", "some", "all") for rare in (False, True)]
LENGTH, SEED = st.integers(1, 60), st.integers(0, 10 ** 6)


@pytest.mark.parametrize("world", WORLDS)
@FUZZ
@given(length=LENGTH, seed=SEED)
def test_invariants_on_walks(world, length, seed):
    """Catches any break of T16 (the letters in `check`). A walk in a small maze comes back to
    where it began, meets goals too early, too often or in another order, and ends anywhere."""
    env = make_env(world)
    old = random_walk(env, length, seed)
    for scheme, rare in SCHEMES:
        check(env, old, scheme, seed, rarity_of(old) if rare else None)


@FUZZ
@given(length=st.integers(1, 12), seed=SEED)
def test_invariants_on_made_up_walks(length, seed):
    """The same where a step reaches up to three goals, or one twice, or none; all are alike."""
    old = made_up_walk(length, seed)
    for scheme, rare in SCHEMES:
        check(envs.Instructed, old, scheme, seed, rarity_of(old) if rare else None)


@pytest.mark.parametrize("world", WORLDS)
@FUZZ
@given(length=LENGTH, seed=SEED, how=st.sampled_from(SCHEMES[2:]))
def test_a_relabeled_walk_is_a_real_one(world, length, seed, how):
    """The oracle: ask the environment itself for the new goals and do the same again. Catches any
    difference from what would really have been seen, earned, and when it would have ended."""
    env = make_env(world)
    old = random_walk(env, length, seed)
    # A road is made for its destinations, so it has to be kept; other worlds do not depend on them.
    road = {name: x for name, x in vars(env).items() if name in ("forks", "drop")}
    new = relabel(env, old, seed, how[0], rarity_of(old) if how[1] else None)
    real = walk(env, seed, old.action, goals_of(new), road)
    np.testing.assert_equal(parts(real), parts(new))


def test_walks_hold_what_they_are_meant_to():
    """Catches tests that prove nothing: worlds where walks hardly ever reach anything, are
    relabeled or cut short."""
    for world in WORLDS:
        env, seen = make_env(world), dict(changed=0, cut=0, real=0, longest=0)
        for seed in range(50):
            old = random_walk(env, 60, seed)
            new = relabel(env, old, seed, "all")
            seen["changed"] += not np.array_equal(goals_of(new), goals_of(old))
            seen["cut"] += len(new) < len(old)
            seen["real"] += old.reward.any() and not old.success
            seen["longest"] = max(seen["longest"], int(new.reward.sum()))
        assert seen["changed"] > 15 and seen["cut"] > 10, (world, seen)
        if "crafter" not in world and "goals=1" not in world:
            assert seen["real"] > 5 and seen["longest"] >= 3, (world, seen)


# ---- Algorithm 1 by hand ----

# What can become of "ACD" in the test below: rewards, and how likely it is in 18ths
#   h = 0   1/3                                        ACD 6
#   h = 1   1/3, the step is 0, 2 or 4, there D or E   BAD 2   ABD 2   ADD 1   AED 1
#   h = 2   1/3, not step 0, 2 or 4                    BAB 2 (not 4)  BAD 1  BAE 1  ABD 1  ABE 1
BY_HAND = {"ACD": ([0, 1, 0, 0, 0, 0], 6, 0), "BAB": ([1, 1, 1], 2, 2),
           "BAD": ([1, 1, 0, 0, 1], 3, 1), "BAE": ([1, 1, 0, 0, 1], 1, 1),
           "ABD": ([0, 1, 1, 0, 1], 3, 1), "ABE": ([0, 1, 1, 0, 1], 1, 1),
           "ADD": ([0, 1, 0, 0, 1, 0], 1, 0), "AED": ([0, 1, 0, 0, 1, 0], 1, 0)}


@pytest.mark.parametrize("scheme", ["some", "all"])
def test_by_hand(scheme):
    """Catches a step of Algorithm 1 that is left out or done otherwise. A, C, D were asked for:

        step        0     1     2     3     4     5
        reached     B     A     B          D, E
        (1)               A                              n = 1 of k = 3, in step 1
        (2), (3)    B           B         D or E         h = 0, 1 or 2 of these steps
        (4)         B     A     B                        h = 2, without step 4: B, A, B
                          A               E              h = 1, step 4: A, E, and still D
        (5)         1     1     1   and it ends here, after 3 steps

    B, A, D may also come from h = 1: then D, which was asked for, is met as well.
    """
    old, rng, counts = letters("ACD", ["B", "A", "B", "", "DE", ""]), np.random.default_rng(0), {}
    for _ in range(1800):
        new = relabel(envs.Instructed, old, rng, scheme)
        reward = BY_HAND[text(new)][0]
        assert new.reward.tolist() == reward
        assert new.done.tolist() == [False] * (len(reward) - 1) + [sum(reward) == 3]
        counts[text(new)] = counts.get(text(new), 0) + 1
    share = {name: row[{"some": 1, "all": 2}[scheme]] for name, row in BY_HAND.items()}
    share = {name: x for name, x in share.items() if x}
    assert counts.keys() == share.keys()
    assert far_from([counts[name] for name in share], list(share.values())) < 4


def test_what_is_seen_by_hand():
    """Catches a status that changes a step early or late: a goal is marked in the first
    observation after the step that met it."""
    old = letters("CD ", ["", "A", "B", ""])
    new = relabel(envs.Instructed, old, 0, "all")
    assert text(new) == "AB "
    assert new.obs["instruction"][:, :, 0].tolist() == [
        [ACTIVE, WAITING, NO_GOAL], [ACTIVE, WAITING, NO_GOAL], [DONE, ACTIVE, NO_GOAL],
        [DONE, DONE, NO_GOAL]]


def test_how_many_goals_are_added():
    """Catches a number of goals that is not uniform in 0..k-n, or one too few; `all` that adds
    fewer than it could; and more goals than there are steps."""
    def added(scheme, asked="ZAYXW", reached="ABCDEF", draws=1500):
        old, rng = letters(asked, list(reached)), np.random.default_rng(1)
        return np.bincount([sum(x not in asked for x in text(relabel(
            envs.Instructed, old, rng, scheme))) for _ in range(draws)], minlength=6)
    counts = added("some")                             # k = 5, n = 0: A is met, but Z is first
    assert counts[:5].sum() + counts[5] == 1500 and (counts > 0).all()
    counts = added("some", asked="AZYXW")              # n = 1: A is met
    assert far_from(counts[:5], [1] * 5) < 4 and counts[5] == 0
    assert added("all", asked="AZYXW", draws=50)[4] == 50
    assert added("all", reached=["B", "", "C", ""], draws=50)[2] == 50
    counts = added("some", reached=["B", "", "C"])     # h = 2, 3, 4 and 5 are all cut to 2
    assert far_from(counts[:3], [1, 1, 4]) < 4


@pytest.mark.parametrize("scheme", ["some", "all"])
def test_nothing_to_relabel(scheme):
    """Catches a crash or a change where nothing was reached or all is done already, and where the
    one step that reached a goal is the one that earned a reward."""
    for asked, reached in (("AB", ["", "", ""]), ("AB", ["A", "C", "B"]), ("AB", ["", "AC"])):
        old = letters(asked, reached)
        assert relabel(envs.Instructed, old, 0, scheme) is old


# ---- rarity ----


def test_frequencies_by_hand():
    """Catches a table that counts rollouts as steps, or a goal that one rollout met twice double,
    and empty rows that are counted as goals."""
    rarity = envs.GoalRarity()
    rarity.update(letters("Z", ["A", "AB", "", "A"]).achieved)
    rarity.update(letters("Z", ["B", "", "", "", "", ""]).achieved)
    assert rarity.steps == {(1,): 3, (2,): 2} and rarity.rollouts == {(1,): 1, (2,): 2}
    assert rarity.total == [10, 2]


class Recorded(envs.GoalRarity):
    """Remembers the weights that it shapes, and takes them all as equal."""

    def shaped(self, weight, rng):
        self.weights.append(weight.tolist())
        return np.full(len(weight), 1 / len(weight))


def test_frequencies_are_saved():
    """Catches a checkpoint that loses the tables, or whose goals are lists and never found."""
    rarity, again = envs.GoalRarity(), envs.GoalRarity()
    rarity.update(letters("Z", ["A", "AB", "", "A"]).achieved)
    again.restore(json.loads(json.dumps(rarity.state())))
    assert vars(again) == vars(rarity)


def test_weights_by_formula():
    """Catches a wrong formula or limit, a step that does not weigh the sum of its goals, and one
    table that is used for all relabelings, or for all draws but the first."""
    reached = letters("Z", ["A", "AB", "C", "D"]).achieved
    rarity, rng, tables = Recorded(), np.random.default_rng(0), []
    rarity.steps, rarity.rollouts = {(1,): 100, (2,): 1, (3,): 20}, {(1,): 10, (2,): 1, (3,): 10}
    rarity.total = [1000, 10]
    # (log10 .1)^4 = 1, (log10 .001)^4 = 81, D was never met: (log10 1e-6)^4 = 1296
    by_steps = dict(A=1, B=81, C=np.log10(.02) ** 4, D=1296)
    by_rollouts = dict(A=1e-3, B=1, C=1e-3, D=256)     # always met: the least weight there is
    for _ in range(200):
        rarity.weights = []
        steps, goals = rarity.choose(reached, np.arange(4), 4, rng)
        assert sorted(steps) == [0, 1, 2, 3]                             # without replacement
        of_all, of_first = rarity.weights[:2]
        table = by_steps if of_all[0] == 1 else by_rollouts
        tables.append(table is by_steps)
        a, b, c, d = table.values()
        left = {0: [a], 1: [a, b], 2: [c], 3: [d]}
        for step, goal, everywhere, here in zip(steps, goals, rarity.weights[::2],
                                                rarity.weights[1::2]):
            assert everywhere == pytest.approx([sum(left[i]) for i in sorted(left)])
            assert here == pytest.approx(left.pop(step))
            assert goal.tolist() in reached[step].tolist() and goal[0]
    assert far_from(np.bincount(tables), [1, 1]) < 4
    rarity.total, rarity.weights = [10 ** 20, 10 ** 20], []
    rarity.choose(reached, np.arange(4), 1, rng)       # (log10 1e-23)^4 = 279841
    assert rarity.weights[0] == [1e5, 2e5, 1e5, 1e5]


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(weight=st.lists(st.one_of(st.floats(1e-3, 1e5), st.sampled_from([1e-3, 1., 5.])),
                       min_size=1, max_size=12), kind=st.integers(0, 3))
def test_shapings_equal_plain_python(weight, kind):
    """Catches a shaping that is not what the docstring says, is drawn too often or too seldom, or
    leaves no probability at all when weights are equal."""
    def choice(number, p):
        assert (number, tuple(p)) == (4, (.2, .1, .1, .6))
        return kind
    order = sorted(weight)
    middle = (order[(len(order) - 1) // 2] + order[len(order) // 2]) / 2
    expected = [(1., w - order[0], max(w - middle, 1e-5), w * (w in order[-5:]))[kind]
                for w in weight]
    if sum(expected) == 0:
        expected = [1.] * len(weight)
    got = envs.GoalRarity.shaped(np.array(weight), SimpleNamespace(choice=choice))
    np.testing.assert_allclose(got, np.array(expected) / sum(expected), rtol=1e-6, atol=1e-12)


def test_rare_goals_are_preferred():
    """Catches rarities that do not reach the choice, and a preference for frequent goals. B is met
    in one step of 40 and one rollout of 10; it is chosen with probability .2 / 40 + .8 x 98 %."""
    common, rare = letters("Z", ["A"] * 40), letters("Z", ["A"] * 20 + ["B"] + ["A"] * 19)
    rarity, rng = envs.GoalRarity(), np.random.default_rng(0)
    for trajectory in [common] * 9 + [rare]:
        rarity.update(trajectory.achieved)

    def share(rarity):
        return np.mean([text(relabel(envs.Instructed, rare, rng, "all", rarity)) == "B"
                        for _ in range(400)])
    assert share(rarity) == pytest.approx(.79, abs=.08) and share(None) < .1


# ---- data ----


@pytest.mark.parametrize("name", ["maze:7x7?goals=5", "delivery:11"])
def test_the_collector_writes_down_what_every_step_reached(name):
    """Catches goals that are stored a step early or late, or left from an older rollout; a lost
    episode or success: the actions, played again in a plain loop, give the same trajectory."""
    torch.manual_seed(0)                           # what is left from an older rollout is rare
    env = make_env(name)
    agent = am.Agent(am.Spec.of(env), am.Config()).eval()
    collector = am.Collector(name, 3, agent, 1024, seed=5)
    finished = [trajectory for _ in range(300) for _, trajectory in collector.step()]
    assert len(finished) >= 3
    for trajectory in finished:
        np.testing.assert_equal(parts(trajectory),
                                parts(walk(env, trajectory.episode, trajectory.action)))


def test_tokens_and_back():
    """Catches a field that `tokens` or `of_tokens` shifts or forgets, and a first token that
    holds a reward, an action or a goal."""
    old = random_walk(make_env("maze:7x7?goals=5&rewired=true"), 30, 3)
    tokens = old.tokens()
    more = dict(success=old.success, episode=old.episode)
    np.testing.assert_equal(parts(am.Trajectory.of_tokens(tokens, **more)), parts(old))
    for name in ("action", "reward", "done", "achieved"):
        assert not tokens[name][0].any() and len(tokens[name]) == 31
        assert tokens[name].dtype == getattr(old, name).dtype
        np.testing.assert_array_equal(tokens[name][1:], getattr(old, name))


@pytest.mark.parametrize("context", [100, 4])
def test_batches_are_relabeled_rollouts(context):
    """Catches a batch that mixes the old rollout with the relabeled one, whose mask or slice is
    that of the longer one, or a relabeling that writes into the buffer."""
    env = make_env("maze:7x7?goals=5&rewired=true")
    drawn, made, rng = [], [], np.random.default_rng(0)

    def record(trajectory):
        drawn.append(copy.deepcopy(trajectory))
        made.append(relabel(env, trajectory, rng))
        return made[-1]
    buffer = am.ReplayBuffer(am.Spec.of(env), 1000, rng, record)
    walks = [random_walk(env, length, length) for length in (1, 3, 9, 20, 40, 60)]
    for trajectory in walks:
        buffer.add(trajectory)
    stored = copy.deepcopy(buffer.tokens)
    batch = buffer.sample(40, context)
    assert len(made) == 40 and am.each(np.array_equal, stored, buffer.tokens) == am.each(
        lambda x: True, stored)
    lengths = [min(len(trajectory), context) for trajectory in made]
    assert batch["mask"].sum(1).tolist() == lengths and buffer.replayed == sum(lengths)
    assert batch["mask"].shape[1] == max(lengths)
    for b, new in enumerate(made):
        source = next(old for old in walks if np.array_equal(old.action, drawn[b].action))
        for name in ("action", "reward", "done", "reset", "achieved"):
            np.testing.assert_array_equal(getattr(drawn[b], name), getattr(source, name))
        length, tokens, start = lengths[b], new.tokens(), int(batch["tokens"]["time"][b, 0])
        here = slice(start, start + length + 1)
        got = dict(batch["tokens"], **batch["tokens"]["obs"])
        want = dict(tokens, **tokens["obs"], time=np.arange(len(new) + 1))
        for name in ("vector", "instruction", "action", "reward", "reset", "time"):
            np.testing.assert_array_equal(got[name][b, :length + 1], want[name][here], name)
        np.testing.assert_array_equal(batch["done"][b, :length], tokens["done"][here][1:])
    if context == 4:
        assert len({int(start) for start in batch["tokens"]["time"][:, 0]}) > 5


# ---- options ----


def test_relabeling_needs_instructions(capsys, tmp_path):
    """Catches an option about instructions that is silently ignored, or a folder left behind."""
    none, meta = "RepeatPreviousEasy has no instructions", "relabeling does not go through meta:"
    for env, option, why in (
            ("popgym:RepeatPreviousEasy", "--relabel some", none),
            ("popgym:RepeatPreviousEasy", "--relabel all", none),
            ("popgym:RepeatPreviousEasy", "--no-importance", none),
            ("popgym:RepeatPreviousEasy", "--hide-plan", none),
            ("meta:maze:5x5", "--relabel some", meta), ("meta:maze:5x5", "--no-importance", meta)):
        assert am.main(f"--env {env} --env-steps 1 --episodes 1 {option}"
                       f" --out {tmp_path / 'run'}".split()) == 2
        error = capsys.readouterr().err
        assert f"{option}: " in error and why in error
        assert error.count("\n") == 1 and not (tmp_path / "run").exists()
    assert am.hindsight(am.Config(hide_plan=True), make_env("meta:maze:5x5"), None)[1] is None
    popgym = make_env("popgym:RepeatPreviousEasy")
    for scheme in ("auto", "none"):
        assert am.hindsight(am.Config(relabel=scheme), popgym, None) == (None, None)


@pytest.mark.parametrize("options, expected", [
    ({}, ("some", True)), (dict(relabel="all", importance=False), ("all", False)),
    (dict(relabel="none"), ("none", True))], ids=["default", "all, no importance", "none"])
def test_training_relabels_as_asked(monkeypatch, tmp_path, options, expected):
    """Catches an option that does not reach relabel, and rarities that are not those of the
    rollouts so far."""
    calls, finished = [], []
    receive = am.Collector.receive

    def record(trajectory, reward_fn, show_fn, rng, scheme, rarity):
        total = list(rarity.total) if rarity else None
        calls.append((scheme, total, [sum(map(len, finished)), len(finished)]))
        return trajectory

    def count(self):
        out = receive(self)
        finished.extend(trajectory for _, trajectory in out)
        return out
    monkeypatch.setattr(am, "relabel", record)
    monkeypatch.setattr(am, "evaluate", lambda *args, **_: dict(
        return_mean=0., return_std=0., success=0., episodes=1, inner_returns=[0.],
        goals=[]))
    monkeypatch.setattr(am.Collector, "receive", count)
    am.train(am.Config(env="maze:5x5", env_steps=200, parallel_envs=4, batch=4,
                       out=str(tmp_path / "run"), **options))
    assert calls and {scheme for scheme, _, _ in calls} == {expected[0]}
    assert all(total == (so_far if expected[1] else None) for _, total, so_far in calls)


# ---- what the agent sees: --hide-plan, --memory ----

SPEC = am.Spec(vector=3, instruction=(3, 3, 11), actions=4, horizon=80)


def random_tokens(T, rollouts=2):
    """Random tokens of SPEC, the first goal done, the second active, the third waiting."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 11, (rollouts, T, 3, 3), generator=generator)
    words[..., 0] = torch.tensor([DONE, ACTIVE, WAITING])
    vector = torch.randn(rollouts, T, 3, generator=generator)
    return dict(obs=dict(vector=vector, instruction=words), reset=torch.zeros(rollouts, T).bool(),
                action=torch.randint(4, (rollouts, T), generator=generator),
                reward=torch.zeros(rollouts, T), time=torch.arange(T).expand(rollouts, T))


@pytest.mark.parametrize("hide", [True, False])
def test_a_hidden_plan_is_hidden(hide):
    """Catches --hide-plan without effect, or one that still tells how many goals there are or were,
    or that hides the current one."""
    torch.manual_seed(0)
    agent, tokens = am.Agent(SPEC, am.Config(hide_plan=hide)).eval(), random_tokens(4)

    def depends_on(slot, change):
        changed = copy.deepcopy(tokens)
        words = changed["obs"]["instruction"][:, :, slot]
        words.copy_(change(words))
        with torch.no_grad():
            return not torch.equal(agent.encoder(changed), agent.encoder(tokens))

    def other_goal(words):
        return torch.cat([words[..., :1], words[..., 1:] % 10 + 1], -1)
    assert [depends_on(slot, other_goal) for slot in range(3)] == [not hide, True, not hide]
    assert depends_on(2, torch.zeros_like) != hide


@pytest.mark.parametrize("layers, memory", [(1, 1), (1, 4), (2, 1), (2, 5), (3, 3)])
def test_memory_is_a_window_in_every_layer(monkeypatch, layers, memory):
    """Catches a window that is one too long or too short: what the agent knows depends on exactly
    the last layers x (memory - 1) + 1 tokens."""
    monkeypatch.setitem(am.SIZES, "nano", dict(am.SIZES["nano"], layers=layers))
    torch.manual_seed(0)
    agent, tokens = am.Agent(SPEC, am.Config(memory=memory)).eval(), random_tokens(24)
    vector = tokens["obs"]["vector"].requires_grad_()
    s = agent.trunk(tokens)
    for t in (0, 7, 23):
        gradient, = torch.autograd.grad((s[:, t] * torch.randn(s.shape[2])).sum(), vector,
                                        retain_graph=True)
        first = max(0, t - layers * (memory - 1))
        seen = gradient.abs().sum((0, 2)) > 0
        assert seen.tolist() == [first <= i <= t for i in range(24)]


@pytest.mark.parametrize("memory", [1, 4])
def test_acting_with_a_memory_window_equals_training(memory):
    """Catches a cache of another length than the window: the two agree however long a rollout is
    (without --memory they would not, beyond the context)."""
    torch.manual_seed(0)
    agent, tokens = am.Agent(SPEC, am.Config(memory=memory)).eval(), random_tokens(60)
    cache, acted = agent.transformer.new_cache(2, 80), []
    with torch.no_grad():
        for t in range(60):
            now = am.each(lambda x: x[:, t:t + 1], tokens)
            acted.append(agent.trunk(now, cache=cache))
            cache.end_step()
        torch.testing.assert_close(torch.cat(acted, 1), agent.trunk(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory, solves", [(1, False), (0, True)])
def test_without_memory_nothing_is_remembered(monkeypatch, memory, solves):
    """Catches --memory 1 that still remembers, or --memory 0 that does not."""
    run = Run(use(monkeypatch, Memory), memory=memory).act(60)
    for _ in range(25):
        run.act(4).learn(6)
    collector = am.Collector("probe", 200, run.agent, 1024, seed=99)
    last = np.mean([trajectory.reward[-1] for _ in range(4) for _, trajectory in collector.step()])
    assert last > 0.8 if solves else abs(last) < 0.3


# ---- learning ----


class Wish(Probe):
    """One step. Each of 30 actions reaches a goal of its own, and one of these is asked for."""
    observation_space = spaces.Dict(vector=spaces.Box(0, 0, (1,), np.float32),
                                    instruction=spaces.Box(0, 30, (1, 2), np.int32))
    action_space, max_achieved = spaces.Discrete(30), 1
    reward, show = staticmethod(envs.instruction_reward), staticmethod(envs.show_instruction)

    def goal(self):
        return np.array([[1 + self.episode % 30]], np.int32)

    def look(self, progress=0):
        return dict(vector=np.zeros(1, np.float32), instruction=self.show(self.goal(), progress))

    def step(self, action):
        reached = np.array([[1 + action]], np.int32)
        reward, progress = self.reward(self.goal(), 0, reached)
        return self.look(progress), reward, True, False, dict(achieved=reached)


@pytest.mark.parametrize("scheme, learns", [("some", True), ("none", False)])
def test_rare_success_is_learned_in_hindsight(monkeypatch, scheme, learns):
    """Catches relabeled data from which nothing can be learned. Random play is paid once in 30
    rollouts, which is too little without relabeling, in the same number of updates."""
    env = use(monkeypatch, Wish)
    run = Run(env, batch=64, relabel=scheme, explore_steps=10 ** 6)
    run.buffer.relabel, run.buffer.rarity = am.hindsight(run.config, env, run.buffer.rng)
    success = am.evaluate(run.act(100).learn(130).agent, "probe", 128)["return_mean"]
    assert success > 0.8 if learns else success < 0.3
