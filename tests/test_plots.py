"""notebooks/plots.py: attention, values, --render, learning curves, its command line."""

import csv
import dataclasses
import itertools
import json
import math
import re
import types

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from PIL import Image

import amago_min as am
from notebooks import keep, plots
from probes import Probe, use

POPGYM, CARTPOLE = "popgym:RepeatPreviousEasy", "meta:gym:CartPole-v1?episodes=2&horizon=8"


def agent_for(env, seed=0, **options):
    """An agent that has learned nothing, with statistics as if it had."""
    torch.manual_seed(seed)
    agent = am.Agent(am.Spec.of(env), am.Config(**options)).eval()
    for name, low, high in (("mean", -3, 3), ("w", 1, 2), ("b", -1, 1)):
        getattr(agent.popart, name).uniform_(low, high)
    agent.popart.square.copy_(agent.popart.mean ** 2 + 4)
    return agent


def rollout(env, **options):
    """An untrained agent, and one episode that it played, of the environment named `env`."""
    agent = agent_for(am.environments.make_env(env), **options)
    return agent, plots.play(agent, env, seed=3)


def save_run(folder, env, agent, **options):
    """What load_checkpoint needs, for an agent that was never trained."""
    folder.mkdir(exist_ok=True)
    config = am.Config(env=env, **options)
    am.save_checkpoint(folder / "checkpoint.pt", dict(
        version=am.VERSION, config=dataclasses.asdict(config), env_steps=0, processes={},
        spec=dataclasses.asdict(agent.spec), learner=dict(average=agent.state_dict())))


class Coloured(Probe):
    """Five steps, drawn in a colour that tells episode and step: 16 times the secret, the step."""
    name, horizon, render_mode, metadata = "coloured", 5, "rgb_array", {}
    size = (20, 30)

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        self.secret = int(self.rng.integers(16))
        return observation, info

    def seen(self):
        return self.secret / 16

    def pay(self, action):
        return self.secret + self.t

    def render(self):
        return np.full((*self.size, 3), (16 * self.secret, 16 * (self.t % 16), 0), np.uint8)


class Several(Probe):
    """Pictures, numbers, an instruction, two inner episodes; the action space is chosen."""
    name, horizon, render_mode, metadata = "several", 6, None, {}
    observation_space = Dict(
        vector=Box(-5, 5, (3,), np.float32), image=Box(0, 255, (8, 8, 3), np.uint8),
        instruction=Box(0, 9, (3, 3), np.int32))

    def look(self):
        goals = [[min(3, 1 + self.t), 7, 8], [1, 5, 6], [0, 0, 0]]
        return dict(vector=np.array([self.t, -self.t, 0.5], np.float32),
                    image=np.full((8, 8, 3), 30 * self.t, np.uint8),
                    instruction=np.array(goals, np.int32))

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {"reset": True} if self.t == 3 else {}

    def format_instruction(self, instruction):
        return " and ".join(f"do {a} {b}" for a, b in instruction.tolist() if a)


# ---- what the agent reads, attends to, expects ----


@pytest.mark.parametrize("env", [POPGYM, "popgym:PositionOnlyPendulumHard", CARTPOLE])
def test_tokens_are_those_of_training(env):
    """Catches a rollout that is drawn as another one than the agent would be trained on."""
    agent, trajectory = rollout(env)
    buffer = am.ReplayBuffer(agent.spec, 5000, np.random.default_rng(0))
    buffer.add(trajectory)
    batch = buffer.sample(1, agent.spec.horizon)
    tokens = plots.tokens_of(agent, trajectory)
    am.each(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0), batch["tokens"], tokens)


@pytest.mark.parametrize("memory", [0, 5])
@pytest.mark.parametrize("positions", ["rotary", "learnable", "sinusoidal", "both"])
def test_attention_is_the_one_of_the_network(positions, memory):
    """Catches weights that are not those which the network's own attention uses."""
    agent, trajectory = rollout(POPGYM, positions=positions, memory=memory)
    for block in agent.transformer.blocks:                   # sharp, and every head another scale
        block.attention.qkv.gamma.data.fill_(4.0)
        torch.nn.init.uniform_(block.attention.head_scale, 0.5, 2)
    weights = torch.from_numpy(plots.attention(agent, trajectory))
    tokens = len(trajectory) + 1
    assert weights.shape == (2, 4, tokens, tokens) and weights.max() > 0.2
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, tokens))
    assert torch.equal(weights, weights.tril())

    seen = []
    for block in agent.transformer.blocks:
        block.attention.register_forward_hook(lambda *call: seen.append(call))
    with torch.no_grad():
        agent.trunk(plots.tokens_of(agent, trajectory))
    for own, (module, (x, *_), output) in zip(weights, seen):
        v = module.qkv(x).unflatten(-1, (3, 4, -1))[0, :, 2]             # (T+1, H, d)
        y = torch.einsum("hts,shd->thd", own, v) * module.head_scale[:, 0]
        torch.testing.assert_close(module.out(y.flatten(1)), output[0])


def test_attention_of_a_beginning_is_the_beginning_of_attention():
    """Catches steps= that cuts something else, and hooks that stay."""
    agent, trajectory = rollout(POPGYM)
    whole, part = (plots.attention(agent, trajectory, steps) for steps in (None, 7))
    assert part.shape == (2, 4, 8, 8)
    np.testing.assert_allclose(part, whole[:, :, :8, :8], atol=1e-6)
    assert not any(block.attention._forward_pre_hooks for block in agent.transformer.blocks)


def test_values_of_discrete_actions_are_the_sum_over_actions():
    """Catches a wrong mean, another unit than reward, gammas or steps that are mixed up."""
    agent, trajectory = rollout(POPGYM)
    found = plots.values(agent, trajectory)
    assert found.shape == (len(trajectory) + 1, 7)
    popart, s = agent.popart, agent.trunk(plots.tokens_of(agent, trajectory))[0].detach()
    std = (popart.square - popart.mean ** 2).sqrt()
    for t, g in itertools.product((0, 1, 20, len(trajectory)), range(7)):
        probability, every_q = agent.actor(s[t:t + 1]).probs[0, g], agent.critics(s[t:t + 1])[0]
        q = [sum(probability[a] * every_q[c, g, a] for a in range(4)) for c in range(4)]
        raw = popart.w[g] * sum(q) / 4 + popart.b[g]
        assert found[t, g] == pytest.approx((raw * std[g] + popart.mean[g]).item(), abs=1e-5)


def test_values_of_continuous_actions_are_those_of_the_policy():
    """Catches values of other actions than the policy's, and of another gamma's policy."""
    agent, trajectory = rollout("popgym:PositionOnlyPendulumHard")
    mean = torch.linspace(-2, 2, 7)
    last = agent.actor.mlp[-1]                               # policies that know what they do:
    last.weight.data.zero_()                                 # tanh(mean), and e^-5 around it
    last.bias.data.copy_(torch.stack([mean, torch.full((7,), -10.0)], 1).flatten())
    agent.critics.weights[0].data[:, -1] *= 30               # the action matters
    found = torch.from_numpy(plots.values(agent, trajectory))
    with torch.no_grad():
        s = agent.trunk(plots.tokens_of(agent, trajectory))[0]

        def value(action):                                   # (G,) -> (T+1, G)
            q = agent.critics(s, action.view(7, 1).expand(len(s), 7, 1)).mean(1)
            return agent.popart.denormalize(agent.popart(q))
    assert (found - value(mean.tanh())).abs().max() < 0.1
    assert (found - value(mean.tanh().flip(0))).abs().max() > 1
    np.testing.assert_array_equal(found, plots.values(agent, trajectory))


def test_looking_changes_nothing():
    """Catches sigma's u and v that move, random numbers that are used up, a mode that stays."""
    agent, trajectory = rollout(POPGYM)
    agent.train()
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    plots.attention(agent, trajectory)
    plots.values(agent, trajectory)
    plots.play(agent, POPGYM)
    assert torch.equal(torch.rand(3), expected) and agent.training
    for name, x in agent.state_dict().items():
        assert torch.equal(x, before[name]), name


def test_discounted_by_hand():
    """Catches a sum that runs the wrong way."""
    np.testing.assert_allclose(plots.discounted(np.array([1.0, 0, 4]), 0.5), [2, 2, 4])


def test_the_lag_of_a_head_that_looks_back():
    """Catches a lag counted in the wrong direction."""
    weights = 0.8 * np.eye(20, k=-3) + 0.01
    assert plots.strongest_lag(weights) == (3, pytest.approx(0.81))


# ---- GIF ----


def frames_of(path):
    """-> list of RGB arrays, seconds in all"""
    with Image.open(path) as gif:
        frames, seconds = [], 0.0
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.array(gif.convert("RGB")).astype(int))
            seconds += gif.info["duration"] / 1000
    return frames, seconds


def test_gif_shows_the_episode_that_was_played(tmp_path, monkeypatch):
    """Catches a GIF of another episode, without its first or last picture, or too fast."""
    agent = agent_for(use(monkeypatch, Coloured))
    config = am.Config(env="coloured")
    secrets = set()
    for seed in range(4):
        trajectory = plots.play(agent, "coloured", seed=seed)
        text = plots.render(agent, config, tmp_path / "a.gif", seed=seed)
        assert text == (f"{tmp_path / 'a.gif'}: 6 frames, return {trajectory.reward.sum():.3f}"
                        " in 5 steps")
        frames, seconds = frames_of(tmp_path / "a.gif")
        assert len(frames) == len(trajectory) + 1 and 5 <= seconds <= 20
        assert frames[0].shape[1] >= 300                     # 30 pixels were made larger
        secret = int(trajectory.reward[0])
        secrets.add(secret)
        for t, frame in enumerate(frames):
            centre = frame[10, frame.shape[1] // 2]
            assert abs(centre - (16 * secret, 16 * t, 0)).max() < 8, (t, centre)
    assert len(secrets) > 1


def test_long_episodes_become_at_most_600_frames(tmp_path, monkeypatch):
    """Catches a GIF without end, one that leaves out the end, and one that is slow."""
    assert plots.FRAMES == 600
    monkeypatch.setattr(plots, "FRAMES", 40)
    agent = agent_for(use(monkeypatch, Coloured, horizon=109))
    plots.render(agent, am.Config(env="coloured", context=64), tmp_path / "a.gif")
    frames, seconds = frames_of(tmp_path / "a.gif")
    assert len(frames) == 40 and 5 <= seconds <= 20
    assert abs(frames[-1][10, 180, 1] - 16 * (109 % 16)) < 8


def test_an_episode_that_cannot_be_played_again_is_not_shown(tmp_path, monkeypatch):
    """Catches pictures of something that did not happen."""
    class Unseeded(Coloured):
        episodes = itertools.count()

        def pay(self, action):
            return next(self.episodes)
    agent = agent_for(use(monkeypatch, Unseeded))
    with pytest.raises(plots.BrokenEnvironment, match="step 0 of the replayed episode"):
        plots.render(agent, am.Config(env="probe"), tmp_path / "a.gif")


def test_sizes_of_pictures():
    """Catches pictures that are too small to see, blurred, or huge."""
    for size, expected in (((9, 7), (396, 308)), ((400, 300), (400, 300)), ((64, 64), (384, 384)),
                           ((1300, 600), (434, 200))):
        assert plots.fit(np.zeros((*size[::-1], 3), np.uint8)).size == expected
    two = np.array([[[0] * 3, [255] * 3]], np.uint8)
    assert set(np.unique(plots.fit(two))) == {0, 255}


def test_caption_tells_step_return_episode_and_goals(monkeypatch):
    """Catches a return that runs ahead, episodes and goals that are counted wrongly."""
    env = use(monkeypatch, Several)
    trajectory = plots.play(agent_for(env), "several")
    trajectory.reward[:] = 1, 2, 4, 8, 16, 32
    trajectory.success = 1.0
    lines = [plots.caption(trajectory, env, t) for t in range(7)]
    assert lines[0] == ["step 0 of 6   return 0.00   episode 1 of 2", "\u00b7 do 7 8",
                        "\u00b7 do 5 6"]
    assert lines[1][1] == "\u25b6 do 7 8"
    assert lines[2] == ["step 2 of 6   return 3.00   episode 1 of 2", "\u2713 do 7 8",
                        "\u00b7 do 5 6"]
    assert lines[3][0] == "step 3 of 6   return 7.00   episode 2 of 2"
    assert lines[6][0] == "step 6 of 6   return 63.00   episode 2 of 2   success"
    env.draws_instruction = True
    assert len(plots.caption(trajectory, env, 0)) == 1


def test_a_new_episode_flashes(tmp_path, monkeypatch):
    """Catches a meta rollout that looks like one episode; its picture is what the agent saw."""
    agent = agent_for(use(monkeypatch, Several))
    plots.render(agent, am.Config(env="several"), tmp_path / "a.gif")
    frames, _ = frames_of(tmp_path / "a.gif")
    bright = [frame[-3, -3].sum() > 400 for frame in frames]
    assert bright == [True, False, False] + [True, False, False, False]
    assert [round(frame[100, 180, 0] / 30) for frame in frames] == [0, 1, 2, 3, 4, 5, 6]


def test_gymnasium_is_asked_for_pictures(monkeypatch):
    """Catches a gymnasium id, alone or inside meta, that is drawn without render_mode; popgym's
    copies of gymnasium's environments do not take it."""
    for name in ("gym:CartPole-v1", CARTPOLE):
        assert plots.picture_env(name).render_mode == "rgb_array"
    assert plots.picture_env("popgym:PositionOnlyCartPole") is None
    assert plots.picture_env(POPGYM) is None


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    """Catches a traceback where one `pip install` helps."""
    agent = agent_for(am.environments.make_env("gym:CartPole-v1"))

    def render(self):
        raise gymnasium.error.DependencyNotInstalled("run `pip install \"gymnasium[box2d]\"`")
    monkeypatch.setattr(type(gymnasium.make("CartPole-v1").unwrapped), "render", render)
    with pytest.raises(ModuleNotFoundError, match='CartPole-v1.* pip install "gymnasium.box2d."$'):
        plots.render(agent, am.Config(env="gym:CartPole-v1"), tmp_path / "a.gif")


def test_the_instruction_is_part_of_the_name(tmp_path, monkeypatch):
    """Catches an episode that is played, or played again, with another instruction, and one that
    stands in the name already and is kept."""
    names, make_env = [], am.environments.make_env
    monkeypatch.setattr(plots, "FRAMES", 5)
    monkeypatch.setattr(am.environments, "make_env", lambda name, *more, **options: (
        names.append(name), make_env(name, *more, **options))[1])
    for env in ("maze:7x7?goals=2", "maze:7x7?goals=2&instruction=travel to (5, 5)"):
        names.clear()
        plots.render(agent_for(make_env(env)), am.Config(env=env), tmp_path / "a.gif",
                     instruction="travel to (1, 1), travel to (1, 3)")
        assert set(names) == {
            env, "maze:7x7?goals=2&instruction=travel to (1, 1), travel to (1, 3)"}
        assert names.count(env) == 2                          # looked at, and given another one
    with pytest.raises(am.UsageError, match="nearest: travel to"):
        plots.render(agent_for(make_env(env)), am.Config(env=env), tmp_path / "b.gif",
                     instruction="travl & (1, 1)")
    assert not (tmp_path / "b.gif").exists()


def test_a_maze_with_an_instruction(tmp_path, monkeypatch):
    """Catches an interface of instructions that is not the one of the real environments."""
    monkeypatch.setattr(plots, "FRAMES", 5)
    config, text = am.Config(env="maze:11x11?goals=2"), "travel to (9, 1), travel to (9, 3)"
    name = plots.fix_instruction(config.env, text)
    env = am.environments.make_env(name)
    agent = agent_for(env)
    assert "strip" not in plots.render(agent, config, tmp_path / "a.gif", instruction=text)
    lines = plots.caption(plots.play(agent, name), env, 0)
    assert lines[1:] == ["\u25b6 travel to (9, 1)", "\u00b7 travel to (9, 3)"]
    with pytest.raises(am.UsageError, match="travl"):
        plots.render(agent, config, tmp_path / "a.gif", instruction="travl to (1, 1)")


# ---- strip plot ----

SPACES = {"discrete": Discrete(3), "multi": MultiDiscrete([2, 3]), "box": Box(-1, 1, (2,)),
          "wide box": Box(-1, 1, (6,))}


@pytest.mark.parametrize("kind", SPACES)
def test_strip_plot_of_every_kind_of_space(kind, monkeypatch):
    """Catches a space that cannot be drawn, and rows that show something else."""
    env = use(monkeypatch, Several, action_space=SPACES[kind])
    agent = agent_for(env)
    trajectory = plots.play(agent, "several")
    figure = plots.plot_strip(agent, trajectory, env)
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert list(panels) == ["observation", "picture", "goals", "action", "reward",
                            "V in units of reward"]
    shown = panels["observation"].images[0].get_array()
    np.testing.assert_allclose(shown[0], np.arange(7) / 6)   # each row on a scale of its own
    np.testing.assert_allclose(shown[1], -np.arange(7) / 6)
    assert [text.get_text() for text in panels["observation"].texts if "±" in text.get_text()] == [
        "±6", "±6", "±0.5"]
    assert [text.get_text() for text in panels["goals"].get_yticklabels()] == ["do 7 8", "do 5 6"]
    status = panels["goals"].images[0].get_array()
    np.testing.assert_array_equal(status, [[1, 2] + [3] * 5, [1] * 7])
    for axes in panels.values():                             # the inner episode that begins at 3
        assert any(list(line.get_xdata()) == [2.5, 2.5] for line in axes.lines)
    actions = panels["action"]
    if kind == "discrete":
        np.testing.assert_array_equal(actions.lines[0].get_ydata(), trajectory.action)
        np.testing.assert_allclose(actions.images[0].get_array().sum(0), 1, rtol=1e-5)
    elif kind == "multi":
        np.testing.assert_array_equal(actions.lines[0].get_ydata(), trajectory.action // 3)
        np.testing.assert_array_equal(actions.lines[1].get_ydata(), trajectory.action % 3)
    elif kind == "box":
        np.testing.assert_array_equal(actions.lines[1].get_ydata(), trajectory.action[:, 1])
    else:
        assert actions.images[0].get_array().shape == (6, 6)


def test_values_are_drawn_for_every_gamma():
    """Catches a line with another gamma's label, and values drawn where nothing is expected."""
    agent, trajectory = rollout(POPGYM)
    axes = plots.plot_values(agent, trajectory).axes[1]
    v, lines = plots.values(agent, trajectory), {x.get_label(): x.get_ydata() for x in axes.lines}
    for g, label in ((0, "0.1"), (4, "0.99"), (6, "0.999 (acts)")):
        np.testing.assert_array_equal(lines[label], v[:-1, g])
    trajectory.done[-1] = False                              # bootstrapped: the end has a value
    axes = plots.plot_values(agent, trajectory).axes[1]
    assert len(axes.lines[0].get_ydata()) == len(trajectory) + 1


def test_observations_are_labelled():
    """Catches a label at the wrong row of a one-hot or of a Dict."""
    def labels(space, number):
        return plots.observation_labels(types.SimpleNamespace(observation_space=space), number)
    assert labels(Discrete(3, start=1), 3) == ["= 1", "= 2", "= 3"]
    assert labels(Dict(a=Discrete(2), b=Box(0, 1, (2,))), 4) == ["a = 0", "a = 1", "b [0]", "b [1]"]
    assert labels(MultiDiscrete([2, 1]), 3) == ["[0] = 0", "[0] = 1", "[1] = 0"]
    assert labels(Several.observation_space, 3) == ["[0]", "[1]", "[2]"]
    assert labels(Discrete(3), 5) == [0, 1, 2, 3, 4]         # not what the agent sees


# ---- --render and the command line ----


def test_render_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Catches --eval --render that draws nothing, and a GIF of a task that has no pictures."""
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", POPGYM, agent_for(am.environments.make_env(POPGYM)))
    (tmp_path / "a.png").write_text("mine")                  # nobody asked for this one
    assert am.main(["--eval", "run", "--episodes", "1", "--render", "a.gif"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("a-strip.png: strip plot, return ")
    assert said.endswith(f"(instead of a.gif: {POPGYM} has no pictures)")
    assert (tmp_path / "a-strip.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").read_text() == "mine" and not (tmp_path / "a.gif").exists()


def test_goal_steps_of_the_episode_that_is_drawn(tmp_path, monkeypatch, capsys):
    """Catches per-goal steps counted from 0, in another order, or of another episode."""
    monkeypatch.chdir(tmp_path)
    name = "maze:5x5?goals=2"
    save_run(tmp_path / "run", name, agent_for(am.environments.make_env(name)))
    trajectory = types.SimpleNamespace(
        reward=np.float32([0, 0, 1, 0]), success=0.0, reset=np.arange(5) == 0,
        obs={"instruction": np.int32([[[2, 1, 3], [1, 3, 2], [0, 0, 0]]] * 5)})
    env = am.environments.make_env(name)
    assert plots.goal_steps(trajectory, env).splitlines() == [
        "", "  travel to (1, 3): done at step 3", "  travel to (3, 2): not done"]
    trajectory.reset[3] = True  # another attempt begins after the third step: meta
    trajectory.reward[3] = 1
    assert plots.goal_steps(trajectory, env).splitlines() == [
        "", "  travel to (1, 3): done at step 3, 4", "  travel to (3, 2): not done"]
    assert am.main(["--eval", "run", "--episodes", "2", "--render", "a.gif"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("a.gif: ") and said[1].startswith("  travel to (")
    assert [line[:9] for line in said if line.startswith("  goal")] == ["  goal 1:", "  goal 2:"]


def test_render_refuses_before_it_plays(tmp_path):
    """Catches a wrong file name that costs an episode, and an error of many lines."""
    agent = agent_for(am.environments.make_env(POPGYM))
    for name, message in (("a.mp4", "has to end in .gif or .png"), ("a", "has to end in"),
                          ("none/a.png", "there is no folder")):
        with pytest.raises(am.UsageError, match=message) as caught:
            plots.render(agent, None, tmp_path / name)       # no config: it cannot play
        assert "\n" not in str(caught.value)
    assert plots.check_file(tmp_path / "a.GIF", (".gif",)) == tmp_path / "a.GIF"


def test_commands_draw(tmp_path, monkeypatch, capsys):
    """Catches a command that draws nothing, and says nothing."""
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", POPGYM, agent_for(am.environments.make_env(POPGYM)))
    for command in ("attention run a.png --steps 9", "values run v.svg"):
        assert plots.main(command.split()) == 0
        name = command.split()[2]
        assert capsys.readouterr().out.strip() == name and (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize("command, message", [
    ("attention none a.png", "none/checkpoint.pt is not there"),
    ("values none a.gif", "has to end in .png or .svg or .pdf"),
    ("curves none a.png", "none/log.csv is not there"),
    ("curves empty.csv a.png", "empty.csv is empty, or no log.csv"),
    ("curves other.csv a.png", "other.csv is empty, or no log.csv"),
    ("curves run", "required: out"), ("attention run a.png --sed 1", "unknown option --sed"),
    ("draw", "invalid choice")])
def test_bad_commands_get_one_line(command, message, tmp_path, monkeypatch, capsys):
    """Catches a traceback, and a message that does not help."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("env_steps,return_mean,return_std\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert plots.main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "a.png").exists()


# ---- learning curves ----


def write_log(folder, steps, returns, **options):
    folder.mkdir()
    with open(folder / "log.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env_steps", "return_mean", "return_std", "success"])
        writer.writerows([x, y, 0.5, ""] for x, y in zip(steps, returns))
    if options:
        (folder / "config.json").write_text(json.dumps(options))
    return folder


def test_seeds_become_one_line(tmp_path):
    """Catches experiments that are mixed up, and seeds of one that are not put together."""
    log = [0, 10], [0, 1]
    runs = [write_log(tmp_path / "a", *log, env="popgym:RepeatPrevious", seed=0, lr=1e-3),
            write_log(tmp_path / "b", *log, env=POPGYM, seed=1, lr=1e-3),
            write_log(tmp_path / "c", *log, env=POPGYM, seed=0, lr=2e-3),
            write_log(tmp_path / "d", *log, env="gym:Gone-v0", seed=0, lr=2e-3),
            write_log(tmp_path / "e", *log)]
    panels = plots.group([plots.Curve.read(run) for run in runs])
    names = {env: {label: [curve.name for curve in curves] for label, curves in groups.items()}
             for env, groups in panels.items()}
    assert names == {POPGYM: {"full": ["a", "b"], "lr 0.002": ["c"]},
                     "gym:Gone-v0": {"": ["d"]}, "": {"e": ["e"]}}
    figure = plots.plot_curves(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["random policy: -0.503", "best possible: 1", "AMAGO paper: 0.997",
                      "full (2 runs, lowest to highest)",
                      "lr 0.002 (1 run, ± one std over episodes)"]
    lines = figure.axes[0].lines
    assert [line.get_ydata()[0] for line in lines[:3]] == pytest.approx([-0.503, 1, 0.997])
    assert lines[3].get_color() != lines[6].get_color()
    assert lines[3].get_linestyle() != lines[6].get_linestyle()


def test_mean_and_spread_by_hand(tmp_path):
    """Catches a mean over seeds that drops the ones that ended first."""
    runs = [write_log(tmp_path / "a", [0, 10, 20], [0, 2, 4]),
            write_log(tmp_path / "b", [0, 10], [0, 6])]
    curves = [plots.Curve.read(run) for run in runs]
    x, mean, low, high = plots.mean_and_spread(curves)
    np.testing.assert_array_equal([x, mean, low, high], [[0, 10, 20], [0, 4, 5], [0, 2, 4],
                                                         [0, 6, 6]])
    assert math.isnan(curves[0].columns["success"][0])
    x, mean, low, high = plots.mean_and_spread(curves[:1])
    np.testing.assert_array_equal([mean, low, high], [[0, 2, 4], [-.5, 1.5, 3.5], [.5, 2.5, 4.5]])


def test_the_spread_of_a_share_is_its_standard_error(tmp_path):
    """Catches the standard deviation of returns around a share of successes."""
    run = write_log(tmp_path / "a", [0, 10], [0, 1], env=POPGYM, seed=0, episodes=25)
    curve = plots.Curve.read(run)
    curve.columns["success"] = np.array([0.0, 0.2])
    _, mean, low, high = plots.mean_and_spread([curve], "success")
    np.testing.assert_allclose([mean, low, high], [[0, .2], [0, .12], [0, .28]])


def test_what_was_taken_away_is_in_the_label(tmp_path):
    """Catches an ablation that is drawn as the algorithm itself, alone or beside it."""
    number = itertools.count()

    def labels(*all_options):
        runs = [write_log(tmp_path / str(next(number)), [0], [0], env=POPGYM, **options)
                for options in all_options]
        return list(plots.group([plots.Curve.read(run) for run in runs])[POPGYM])
    assert labels(dict(memory=1)) == ["no memory"]
    assert labels(dict(relabel="some")) == [""]
    assert labels(dict(size="small", tau=0.02)) == [""]      # of all alike: not worth a label
    default = list(am.Config().gammas)
    assert labels(dict(relabel="none"), dict(relabel="auto"), dict(relabel="all", gammas=default),
                  dict(relabel="some", gammas=[0.999]), dict(relabel="auto", gammas=[0.1, 0.9])
                  ) == ["full", "no relabeling", "relabel all", "one gamma, 0.999",
                        "2 gammas, 0.1 to 0.9"]
    assert labels(dict(tau=0.01, hide_plan=True), dict(tau=0.02, importance=False)) == [
        "plan hidden", "any goal as good, tau 0.02"]


def test_noise_over_200_000_steps_is_the_default_in_words():
    """Catches a label on all runs that were made before 0 stood for it."""
    assert plots.departures(dict(explore_steps=200_000)) == {} == plots.departures({})
    assert plots.departures(dict(explore_steps=600_000)) == {
        "explore_steps": "explore_steps 600000"}


def test_every_run_is_found_once(tmp_path):
    """Catches runs that are left out, counted twice, and the shorter one of two."""
    def write(name, steps, **options):
        return write_log(tmp_path / name, steps, [0] * len(steps), **options)
    write("a", [0, 10], env="popgym:RepeatPrevious", seed=0, env_steps=10, lr=1e-3)
    write("b", [0, 10, 20], env=POPGYM, seed=0, env_steps=20, lr=1e-3)
    write("c", [0, 10], env=POPGYM, seed=1, env_steps=10, lr=1e-3)
    write("d", [0, 10], env=POPGYM, seed=0, env_steps=10, lr=2e-3)
    write("e", [0, 10])                                      # no config.json: no run of ours
    write("f-earlier", [0, 10, 30], env=POPGYM, seed=1, env_steps=30, lr=1e-3)
    assert [run.name for run in plots.find_runs(tmp_path)] == ["b", "c", "d"]


def test_one_legend_for_all_panels(tmp_path):
    """Catches an experiment whose colour changes from panel to panel."""
    runs = [write_log(tmp_path / f"{env}{memory}", [0, 10], [0, 1], env=f"popgym:{env}Easy", seed=0,
                      memory=memory)
            for env, memory in (("Autoencode", 1), ("RepeatFirst", 0), ("RepeatFirst", 1))]
    figure = plots.plot_curves(runs, one_legend=True)
    colours = [{line.get_label(): line.get_color() for line in axes.lines}["no memory"]
               for axes in figure.axes]
    assert colours[0] == colours[1] and all(axes.get_legend() is None for axes in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "random policy", "best possible", "AMAGO paper", "no memory", "full"]


# ---- success by goal ----


def test_goals_are_read_from_what_eval_printed(tmp_path, capsys):
    """Catches a pattern that no longer fits what --eval prints."""
    env = "maze:7x7"
    save_run(tmp_path / "run", env, agent_for(am.environments.make_env(env)))
    for goal in ("travel to (5, 3)", "travel to (1, 1), travel to (5, 3)"):
        assert am.main(["--eval", str(tmp_path / "run"), "--instruction", goal,
                        "--episodes", "4"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "goals.txt").write_text(printed)
    done = plots.read_goals(tmp_path / "goals.txt")
    assert list(done) == ["travel to (5, 3)", "travel to (1, 1), travel to (5, 3)"]
    successes = [float(share) for share in re.findall(r"success ([0-9.]+)", printed)]
    assert list(done.values()) == [(round(4 * share), 4) for share in successes]
    figure = plots.plot_goals(done, random={"travel to (5, 3)": 0.5}, paper={})
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([k / n for k, n in done.values()])


def test_progress_shows_each_goal_in_its_panel(tmp_path):
    """Catches points out of order, a goal in another's panel, and references that are lost."""
    columns = "env_steps,updates,asked,episodes,success\n"
    (tmp_path / "a.csv").write_text(columns + "200,2,eat cow,4,0.5\n100,1,eat cow,4,0.25\n"
                                    "200,2,wake up,4,1\n")
    (tmp_path / "b.csv").write_text(columns + "300,3,wake up,4,0\n")
    figure = plots.plot_progress({"full": tmp_path / "a.csv", "none": tmp_path / "b.csv"},
                                 columns=3, paper={"wake up": 0.1})
    shown = [{line.get_label(): np.transpose(line.get_data()).tolist() for line in axes.lines}
             for axes in figure.axes]
    assert [axes.get_title() for axes in figure.axes] == ["eat cow", "wake up", ""]
    assert shown[0] == {"full": [[100, 0.25], [200, 0.5]]}
    assert shown[1]["full"] == [[200, 1]] and shown[1]["none"] == [[300, 0]]
    assert shown[1]["paper"] == [[0, 0.1], [1, 0.1]] and not figure.axes[2].axison
    assert [text.get_text() for text in figure.legends[0].texts] == ["full", "none", "paper"]


def test_wilson_by_hand():
    """Catches intervals that leave [0, 1] or have no length at its ends."""
    assert plots.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert plots.wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert plots.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_small_png_is_the_same_picture():
    """Catches a picture for notebooks that lost its size or its colours."""
    figure = plots.Figure(figsize=(4, 3), dpi=100)
    axes = figure.subplots()
    for i, colour in enumerate(plots.COLOURS):
        axes.plot([i, i + 1], color=colour, lw=3)
    axes.imshow(np.linspace(0, 1, 10_000).reshape(100, 100), cmap="Greys", extent=(0, 3, 0, 9))
    with Image.open(plots.io.BytesIO(plots.small_png(figure))) as picture:
        assert picture.size == (400, 300) and picture.mode == "P"
        colours = np.array(picture.convert("RGB")).reshape(-1, 3)
    for colour in plots.COLOURS:
        red_green_blue = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(colours.astype(int) - red_green_blue).max(1) < 12).any(), colour


# ---- keep.py ----


def test_a_kept_agent_plays_the_same_and_is_small(tmp_path, monkeypatch, capsys):
    """Catches a kept agent that is not the one that acted, and one that carries its buffer."""
    monkeypatch.chdir(tmp_path)
    assert am.main(["--env", POPGYM, "--env-steps", "2000", "--threads", "1", "--out", "run"]) == 0
    size = keep.keep("run", "kept")
    assert size < 2_000_000 < (tmp_path / "run/checkpoint.pt").stat().st_size
    assert sorted(x.name for x in (tmp_path / "kept").iterdir()) == [
        "checkpoint.pt", "config.json", "eval.json", "log.csv"]
    said = []
    for folder in ("run", "kept"):
        capsys.readouterr()
        assert am.main(["--eval", folder, "--episodes", "8"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert am.main(["--resume", "kept"]) == 2
    assert capsys.readouterr().err == (
        "amago_min.py: kept was trained by others: its agent alone was kept\n")
    with pytest.raises(am.UsageError, match="kept holds an agent already"):
        keep.keep("run", "kept")
