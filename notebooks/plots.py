"""Pictures of runs and of trained agents: the one place for drawing beyond a run's curve.png.

    python amago_min.py --eval DIR --render episode.gif      # or .png: one episode, see `render`
    python notebooks/plots.py attention DIR attention.png    # every head over one rollout
    python notebooks/plots.py values DIR values.png          # V for each gamma over one rollout
    python notebooks/plots.py curves DIR... curves.png       # mean and spread over seeds

From Python every plot_* function returns a matplotlib Figure and, given a path, saves it.
Letters as in amago_min.py: T transitions, T+1 tokens, G discount factors, C critics.
"""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import math
import re
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from gymnasium.error import DependencyNotInstalled
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import amago_min as am  # noqa: E402 (after the path)
import envs as environments  # noqa: E402
from envs import BrokenEnvironment, UsageError  # noqa: E402

WIDTH = 8.0                                  # inches: a notebook's column
# Okabe and Ito's colours, which colour-blind people can tell apart; with other line styles and
# other greys they survive a black-and-white printer too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
REFERENCES = {"random": ("random policy", ":"), "untrained": ("before training", ":"),
              "best": ("best possible", "--"), "paper": ("AMAGO paper", "-.")}

# ==================================================================================================
# 1. One episode, played and played again


@contextlib.contextmanager
def looking(agent, seed=0):
    """Inside this `with` block the agent is in eval mode, without gradients, and random numbers
    begin at `seed`; afterwards everything is as it was."""
    was_training = agent.training
    agent.eval()
    try:
        gpus = [d for d in (agent.gammas.device,) if d.type == "cuda"]
        with torch.no_grad(), torch.random.fork_rng(gpus):
            torch.manual_seed(seed)
            yield
    finally:
        agent.train(was_training)


def play(agent, env, context=1024, seed=0):
    """The agent plays one episode of the environment named `env` -> Trajectory"""
    with looking(agent, seed):
        collector = am.Collector(env, 1, agent, context, seed)
        while True:
            for _, trajectory in collector.step():
                return trajectory


def fix_instruction(name, instruction):
    """The environment's name with an instruction, a text, among its options; as it is if None."""
    return name if instruction is None else environments.fix_instruction(name, instruction)


def picture_env(name):
    """An environment whose render() gives pictures, or None if there are none of this one."""
    env = environments.make_env(name)
    if env.render_mode == "rgb_array":
        return env
    gym = env.name.startswith(("gym:", "meta:gym:"))         # these take an option for it
    if gym and "rgb_array" in env.metadata.get("render_modes", ()):
        return environments.make_env(name, render_mode="rgb_array")
    return None


def replay(env, trajectory, draw):
    """Play a trajectory again, from its episode and its actions; yields draw(t) for every token.

    Raises BrokenEnvironment if the rewards are not the same ones: it is another episode then.
    """
    env.reset(options={"episode": trajectory.episode})
    yield draw(0)
    for t, action in enumerate(am.Spec.of(env).to_env(trajectory.action)):
        reward = env.step(action)[1]
        if np.float32(reward) != trajectory.reward[t]:
            raise BrokenEnvironment(f"{env.name}: step {t} of the replayed episode is paid {reward}"
                                    f", not {trajectory.reward[t]}; it does not follow its seed")
        yield draw(t + 1)


def tokens_of(agent, trajectory, steps=None):
    """A whole rollout, or its first `steps` steps, as Agent.trunk reads it: each (1, T+1, ...)."""
    tokens = dict(trajectory.tokens(), time=np.arange(len(trajectory) + 1))
    end = None if steps is None else steps + 1
    return am.each(lambda x: torch.from_numpy(x[None, :end]).to(agent.gammas.device), tokens)


# ==================================================================================================
# 2. What the agent attends to and what it expects
def attention(agent, trajectory, steps=None):
    """Every head's weights over one rollout, or over its first `steps` steps.

    -> (layers, H, T+1, T+1): row t is what token t attends to, softmax(q k' / sqrt(d)); rows sum to
    1, and nothing is right of the diagonal, nor beyond --memory. The whole rollout is one forward
    pass, while acting forgets what is more than `context` steps ago.
    """
    blocks, inputs = agent.transformer.blocks, []
    hooks = [block.attention.register_forward_pre_hook(
        lambda module, given: inputs.append((module, *given[:2], given[4]))) for block in blocks]
    try:
        with looking(agent):
            agent.trunk(tokens_of(agent, trajectory, steps))
            return torch.cat([head_weights(*x) for x in inputs]).cpu().numpy()
    finally:
        for hook in hooks:
            hook.remove()


def head_weights(module, x, rotation, window=None):
    """The weights of a CausalAttention on the input x (B, T, D) -> (B, H, T, T)"""
    B, T, D = x.shape
    d = D // module.heads
    qk = module.qkv(x).view(B, T, 3, module.heads, d)[:, :, :2]
    if rotation is not None:
        qk = am.rotate(qk, *rotation)
    q, k = qk.permute(2, 0, 3, 1, 4)                                     # (B, H, T, d) each
    seen = torch.ones(T, T, dtype=bool, device=x.device).tril() if window is None else window
    return (q @ k.transpose(2, 3) / math.sqrt(d)).masked_fill(~seen, -math.inf).softmax(-1)


def values(agent, trajectory, samples=64):
    """V_g(s_t), the mean over critics of E_pi Q_g, in units of reward -> (T+1, G)

    For continuous actions the expectation is a mean over `samples` of pi's actions. After a rollout
    that is done nothing is paid any more: there the last row has no meaning.
    """
    with looking(agent):
        s = agent.trunk(tokens_of(agent, trajectory))[0]                 # (T+1, D)
        pi = agent.actor(s)
        if agent.spec.discrete:
            q = (agent.critics(s) * pi.probs.unsqueeze(1)).sum(-1)       # (T+1, C, G)
        else:
            q = sum(agent.critics(s, pi.sample()) for _ in range(samples)) / samples
        return agent.popart.denormalize(agent.popart(q)).mean(1).cpu().numpy()


def policy(agent, trajectory):
    """pi(a | s_t) of the acting gamma, discrete actions only -> (T, A)"""
    with looking(agent):
        s = agent.trunk(tokens_of(agent, trajectory))[0, :-1]
        return agent.actor(s).probs[:, -1].cpu().numpy()


def discounted(reward, gamma):
    """What was really paid from each step on, sum_k gamma^k r_t+k: (T,) -> (T,)"""
    total, out = 0.0, np.zeros(len(reward))
    for t in reversed(range(len(reward))):
        out[t] = total = reward[t] + gamma * total
    return out


# ==================================================================================================
# 3. --render
def render(agent, config, path, seed=0, instruction=None):
    """Play one episode of config.env and draw it into `path` -> a line that says what was drawn,
    and one more for each goal of the episode's instruction.

        .gif    the environment's own pictures; if it has none, a strip plot beside it, *-strip.png
        .png    a strip plot: observations, actions, rewards and V for each gamma over time

    instruction: a text that fixes the episode's. Raises UsageError, ModuleNotFoundError if a
    package is missing that the environment draws with, and OSError.
    """
    path = check_file(path, (".gif", ".png"))
    name = fix_instruction(config.env, instruction)
    env = environments.make_env(name)
    trajectory = play(agent, name, config.context, seed)
    result = f"return {trajectory.reward.sum():.3f} in {len(trajectory)} steps"
    goals = goal_steps(trajectory, env)
    if path.suffix.lower() == ".gif":
        drawn = pictures(name, trajectory)
        if drawn is not None:
            frames = write_gif(path, trajectory, *drawn)
            return f"{path}: {frames} frames, {result}{goals}"
        wanted, path = path, path.with_name(path.stem + "-strip.png")
        result += f" (instead of {wanted.name}: {env.name} has no pictures)"
    plot_strip(agent, trajectory, env, path)
    return f"{path}: strip plot, {result}{goals}"


def check_file(path, endings):
    """-> Path. Raises UsageError for another ending, for a folder that is not there, and for what
    cannot be written, before any work was done for it."""
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise UsageError(f"{str(path)!r} cannot be drawn; its name has to end in "
                         + " or ".join(endings))
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}")
    try:
        there = path.exists()
        open(path, "ab").close()                             # nothing else tells for sure
        if not there:
            path.unlink()
    except OSError as problem:
        raise UsageError(f"{path} cannot be written: {problem.strerror}") from None
    return path


def pictures(name, trajectory):
    """-> environment, function of t that gives the picture (H, W, 3) of token t; None if there are
    no pictures. Without any of its own, a picture that the agent observes will do."""
    env = picture_env(name)
    if env is None and "image" in trajectory.obs:
        image = trajectory.obs["image"]
        colour = image if image.shape[-1] == 3 else image[..., -1:].repeat(3, -1)
        return environments.make_env(name), colour.__getitem__
    return env and (env, functools.partial(render_frame, env))


def render_frame(env, t):
    try:
        return env.render()
    except (ImportError, DependencyNotInstalled) as problem:   # pygame, which is not asked earlier
        raise ModuleNotFoundError(f"pictures of {env.name.partition('?')[0]} need a package: "
                                  + environments.pip_command(problem)) from problem


FRAMES = 600                                                 # at most, in one GIF
BAR, FLASH, INK = (32, 32, 32), (240, 228, 66), {False: (255, 255, 255), True: (0, 0, 0)}
MARKS = {1: "\u00b7", 2: "\u25b6", 3: "\u2713"}              # a goal that waits, is next, is done


def write_gif(path, trajectory, env, picture):
    """Replay, draw and write at most FRAMES pictures, 5 to 20 s -> their number."""
    T = len(trajectory)
    starts = np.flatnonzero(trajectory.reset)
    shown = set(np.linspace(0, T, min(T + 1, FRAMES)).round().astype(int).tolist())
    # 0.1 s each, unless that takes less than 5 or more than 20 s. GIFs count in 0.01 s, and
    # viewers slow down anything shorter than 0.02 s.
    pause = int(np.clip(100, 5000 / len(shown), 18_000 / len(shown)) // 10 * 10)
    flash = max(1, 800 // pause) * T / len(shown)            # steps
    frames = []
    for t, frame in enumerate(replay(env, trajectory, lambda t: t in shown and picture(t))):
        if frame is False:
            continue
        is_new = len(starts) > 1 and t - starts[starts <= t][-1] < flash
        frame = add_caption(fit(frame), caption(trajectory, env, t), is_new)
        frames.append(frame.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE))
    pauses = [pause] * (len(frames) - 1) + [min(pause + 1500, 2000)]     # a last look at the end
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=pauses, loop=0)
    return len(frames)


def fit(frame):
    """An RGB array as a picture of 200 to 640 pixels, made larger by whole factors only."""
    picture = Image.fromarray(frame)
    size = max(picture.size)
    if size > 640:
        return picture.reduce(-(-size // 640))
    scale = max(1, 400 // size)
    return picture.resize([scale * x for x in picture.size], Image.Resampling.NEAREST)


def caption(trajectory, env, t):
    """The lines below the picture of token t."""
    T, number = len(trajectory), trajectory.reset[:t + 1].sum()
    line = f"step {t} of {T}   return {trajectory.reward[:t].sum():.2f}"
    if trajectory.reset.sum() > 1:
        line += f"   episode {number} of {trajectory.reset.sum()}"
    if t == T and not math.isnan(trajectory.success):
        line += "   success" if trajectory.success == 1 else "   no success"
    goals = [] if getattr(env, "draws_instruction", False) else goals_at(trajectory, env, t)
    return [line] + [f"{MARKS[status]} {text}" for status, text in goals]


def goals_at(trajectory, env, t):
    """[(status, text)] of the instruction that token t shows; empty if there is none."""
    if "instruction" not in trajectory.obs:
        return []
    while not hasattr(env, "format_instruction") and hasattr(env, "inner"):
        env = env.inner
    text = getattr(env, "format_instruction", str)
    return [(int(row[0]), text(row[None, 1:])) for row in trajectory.obs["instruction"][t]
            if row[0]]


def goal_steps(trajectory, env):
    """One line for each goal of the instruction: what it asks for, the step that did it; in meta:
    one step for each inner episode that came so far."""
    paid = np.flatnonzero(trajectory.reward)
    begins = np.flatnonzero(trajectory.reset[1:-1])                  # of later inner episodes
    attempts = np.split(paid + 1, np.searchsorted(paid, begins + 1))
    texts = [text for _, text in goals_at(trajectory, env, 0)]
    steps = [", ".join(str(x[k]) for x in attempts if k < len(x)) for k in range(len(texts))]
    return "".join(f"\n  {text}: {f'done at step {when}' if when else 'not done'}"
                   for text, when in zip(texts, steps))


@functools.cache
def font(size):
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def add_caption(picture, lines, flash=False):
    """A bar with lines of text below the picture; bright where an inner episode begins."""
    width, bar = max(picture.width, 360), 10 + 20 * len(lines)
    out = Image.new("RGB", (width, picture.height + bar), FLASH if flash else BAR)
    out.paste(BAR, (0, 0, width, picture.height))
    out.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(out)
    for i, line in enumerate(lines):
        size = 15
        while size > 9 and font(size).getlength(line) > width - 12:
            size -= 1
        pen.text((6, picture.height + 5 + 20 * i), line, INK[flash], font(size))
    return out


# ==================================================================================================
# 4. Strip plot and values
def plot_strip(agent, trajectory, env, path=None):
    """Observations, actions, rewards and V for each gamma of one rollout, over time."""
    panels = [(draw, rows) for part in trajectory.obs
              for draw, rows in [observation_panel(trajectory, env, part)]]
    panels += [action_panel(agent, trajectory, env)]
    panels += [(functools.partial(draw_rewards, trajectory), 4),
               (functools.partial(draw_values, agent, trajectory), 9)]
    return stack(panels, trajectory, env.name, path)


def plot_values(agent, trajectory, title="", path=None):
    """V for each gamma over one rollout, above it what was paid."""
    panels = [(functools.partial(draw_rewards, trajectory), 3),
              (functools.partial(draw_values, agent, trajectory), 9)]
    return stack(panels, trajectory, title, path)


def stack(panels, trajectory, title, path):
    """Panels one above the other with one time axis. panels: [(draw(axes), height in rows)]"""
    heights = [0.35 + 0.2 * rows for _, rows in panels]
    figure = Figure(figsize=(WIDTH, 0.9 + sum(heights)), dpi=120, layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (draw, _) in zip(rows, panels):
        draw(axes)
        for start in np.flatnonzero(trajectory.reset)[1:]:   # inner episodes
            axes.axvline(start - 0.5, color="k", lw=1)
    episodes = trajectory.reset.sum()
    for number, start in enumerate(np.flatnonzero(trajectory.reset) if episodes > 1 else (), 1):
        text = f"episode {number}" if number == 1 or episodes <= 8 else number
        rows[-2].annotate(text, (start - 0.4, 1), xytext=(0, 2), fontsize=8,
                         xycoords=("data", "axes fraction"), textcoords="offset points")
    rows[-1].set(xlabel="step t", xlim=(-0.5, len(trajectory) + 0.5))
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    result = f"return {trajectory.reward.sum():.3f} in {len(trajectory)} steps"
    figure.suptitle(textwrap.fill(f"{title}: {result}" if title else result, 100), fontsize=11)
    return saved(figure, path)


def saved(figure, path):
    if path is not None:
        figure.savefig(path)
    return figure


def small_png(figure, colours=48):
    """The figure as a PNG of so many colours, a third as large as matplotlib's: for notebooks,
    whose outputs are kept in git. display(IPython.display.Image(small_png(figure)))"""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with Image.open(buffer) as picture:
        picture = picture.convert("RGB").quantize(colours, Image.Quantize.FASTOCTREE,
                                                  dither=Image.Dither.NONE)   # keeps pure colours
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def heat(axes, x, labels, what):
    """Rows of numbers x (rows, columns) over time, each row on a scale of its own, whose end, its
    largest absolute value, stands on the right where it is not 1. Without negative numbers from
    white to black, else from dark to bright, which shows signs in a black-and-white print too."""
    scale = np.abs(x).max(axis=1, initial=0)
    y = x / np.where(scale > 0, scale, 1)[:, None]
    low, colours = (-1, "cividis") if x.min() < 0 else (0, "Greys")
    axes.imshow(y, aspect="auto", interpolation="nearest", cmap=colours, vmin=low, vmax=1)
    axes.set_ylabel(what)
    if low:
        axes.set_title("dark: negative, bright: positive", fontsize=8, loc="right")
    few = len(x) <= 24
    ticks = range(len(x)) if few else np.linspace(0, len(x) - 1, 5).astype(int)
    axes.set_yticks(ticks, [labels[i] for i in ticks], fontsize=8)
    for i in ticks if few else ():
        if not math.isclose(scale[i], 1, rel_tol=1e-3):
            sign = "" if scale[i] == 0 else "\u00b1" if low else "0.."
            axes.annotate(f"{sign}{scale[i]:.2g}", (1.004, i), va="center", fontsize=7,
                          xycoords=("axes fraction", "data"))


def observation_panel(trajectory, env, part):
    """-> (draw(axes), height in rows) of one part of the observation"""
    x = trajectory.obs[part]
    if part == "image":
        return functools.partial(draw_images, trajectory), 3
    if part == "instruction":
        return functools.partial(draw_instruction, trajectory, env), 1 + (x[0, :, 0] > 0).sum()
    labels = observation_labels(env, x.shape[1]) if part == "vector" else list(range(x.shape[1]))
    name, most = ("observation", 24) if part == "vector" else (part, 10)
    return functools.partial(heat, x=x.T, labels=labels, what=name), min(max(3, x.shape[1]), most)


def observation_labels(env, number):
    """What each number of the observation vector is, as far as the raw environment's space tells:
    '= 2' for one entry of a one-hot, 'deck [0]' inside of a Dict."""
    while hasattr(env, "inner"):
        env = env.inner
    labels = []
    for place, space in environments.leaves(env.observation_space):
        name = " ".join(map(str, place)) if place != ("vector",) else ""
        if isinstance(space, environments.spaces.Discrete):
            labels += [f"{name} = {int(space.start) + i}" for i in range(space.n)]
        elif isinstance(space, environments.spaces.MultiDiscrete):
            labels += [f"{name} [{j}] = {i}" for j, n in enumerate(space.nvec.ravel())
                       for i in range(n)]
        elif not environments.is_image(space) and "instruction" not in place:
            labels += [f"{name} [{i}]" for i in range(math.prod(space.shape))]
    return [label.strip() for label in labels] if len(labels) == number else list(range(number))


def draw_images(trajectory, axes):
    """A few of the pictures that the agent saw, each at its step."""
    images = trajectory.obs["image"]
    number = min(8, len(images))
    times = np.linspace(0, len(images) - 1, number).astype(int)
    for i, t in enumerate(times):
        image = images[t] if images.shape[-1] == 3 else images[t][..., -1]
        inset = axes.inset_axes((i / number, 0.04, 0.9 / number, 0.8))
        inset.imshow(image, cmap="gray", vmin=0, vmax=255)
        inset.set(xticks=[], yticks=[])
        inset.set_title(f"t = {t}", fontsize=8, pad=2)
    axes.set(ylabel="picture", yticks=[])
    axes.tick_params(bottom=False)


def draw_instruction(trajectory, env, axes):
    """The status of each goal: white waiting, orange the next one, green done."""
    goals = goals_at(trajectory, env, 0)
    status = trajectory.obs["instruction"][:, :len(goals), 0].T          # (goals, T+1)
    axes.imshow(status, aspect="auto", interpolation="nearest", vmin=1, vmax=3,
                cmap=ListedColormap(["#f2f2f2", "#E69F00", "#006B4E"]))
    axes.set_yticks(range(len(goals)), [text for _, text in goals], fontsize=8)
    axes.set_ylabel("goals")
    axes.set_title("light: waiting, orange: next, dark green: done", fontsize=8, loc="right")


def action_panel(agent, trajectory, env):
    """-> (draw(axes), height in rows): chosen actions, on the policy's probabilities where these
    can be drawn."""
    spec = agent.spec
    if not spec.discrete or spec.nvec:
        x = np.stack(spec.to_env(trajectory.action)).T.astype(float)     # (dimensions, T)
        draw = functools.partial(heat if len(x) > 4 else draw_lines, x=x, what="action",
                                 labels=[f"[{i}]" for i in range(len(x))])
        return draw, min(max(5, len(x)), 24)
    return functools.partial(draw_choices, agent, trajectory), min(max(3, spec.actions), 16)


def draw_lines(axes, x, labels, what):
    for i, row in enumerate(x):
        axes.plot(row, color=COLOURS[i], ls=STYLES[i], lw=1.2, drawstyle="steps-mid",
                  label=labels[i])
    axes.set_ylabel(what)
    if len(x) > 1:
        axes.legend(fontsize=8, ncols=len(x), loc="upper right")


def draw_choices(agent, trajectory, axes):
    """One discrete action per step: dots on pi(a | s_t), darker is more likely."""
    axes.imshow(policy(agent, trajectory).T, aspect="auto", interpolation="nearest", vmin=0, vmax=1,
                cmap="Greys", alpha=0.6)
    size = min(5.0, max(2.5, 500 / len(trajectory)))
    axes.plot(trajectory.action, "o", color=COLOURS[1], ms=size, mec="white", mew=size / 6)
    axes.set_ylabel("action")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("dots: taken; the darker, the likelier", fontsize=8, loc="right")


def draw_rewards(trajectory, axes):
    T = len(trajectory)
    axes.axhline(0, color="0.6", lw=0.8)
    axes.vlines(range(T), 0, trajectory.reward, color=COLOURS[0], lw=max(0.8, min(3, 250 / T)))
    axes.set_ylabel("reward")
    axes.margins(y=0.1)


def draw_values(agent, trajectory, axes):
    """V for each gamma, and the discounted return that then came for the acting one."""
    v, gammas = values(agent, trajectory), agent.gammas.tolist()
    end = len(trajectory) + (not trajectory.done[-1])        # nothing is expected after the end
    shades = matplotlib.colormaps["viridis"](np.linspace(0.92, 0.0, len(gammas)))
    for g, gamma in enumerate(gammas):
        acts = g == len(gammas) - 1
        axes.plot(v[:end, g], color=shades[g], ls="-" if acts else STYLES[1:][g % 6],
                  lw=2.4 if acts else 1.3, label=f"{gamma:.5g}" + " (acts)" * acts)
    axes.axhline(0, color="0.6", lw=0.8)
    paid, limits = discounted(trajectory.reward, gammas[-1]), axes.get_ylim()
    far = bool(np.ptp(paid) > 4 * np.ptp(limits))            # it would press the rest flat
    axes.plot(paid, color="0.55", lw=1, label=f"paid from t on,\ndiscounted by {gammas[-1]:.5g}"
              + "\n(off the scale)" * far)
    if far:
        axes.set_ylim(limits)
    axes.set_ylabel("V in units of reward")
    axes.legend(fontsize=8, title=r"$\gamma$", title_fontsize=9, loc="center left",
                bbox_to_anchor=(1.0, 0.5))


# ==================================================================================================
# 5. Attention
def strongest_lag(weights):
    """weights (T+1, T+1) of one head -> (lag, mean weight): how many steps ago it looks most."""
    size = len(weights)
    means = [np.diagonal(weights, -lag).mean() for lag in range(max(1, size - 4))]
    return int(np.argmax(means)), float(max(means))


def plot_attention(weights, title="", path=None):
    """Every head's weights, as `attention` gives them: (layers, H, T+1, T+1)."""
    layers, heads, size, _ = weights.shape
    columns = min(heads, 4)
    rows = layers * -(-heads // columns)
    figure = Figure(figsize=(WIDTH, 0.7 + 1.95 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    future = np.triu(np.ones((size, size), bool), 1)
    for i, axes in enumerate(grid.flat):
        layer, head = divmod(i, -(-heads // columns) * columns)
        if head >= heads:
            axes.set_axis_off()
            continue
        lag, mean = strongest_lag(weights[layer, head])
        # The root shows weights of one in a hundred too, such as the uniform ones of a long past.
        picture = axes.imshow(np.ma.array(weights[layer, head], mask=future), cmap="magma_r",
                              norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        axes.set_facecolor("0.93")
        fixed = f"{lag} steps ago: {mean:.2f}" if mean > 0.3 else "no fixed lag"
        axes.set_title(f"layer {layer + 1}, head {head + 1}\n{fixed}", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in grid[-1]:
        axes.set_xlabel("attends to step", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("at step t", fontsize=8)
    bar = figure.colorbar(picture, ax=grid, shrink=0.6, ticks=(0, .01, .1, .25, .5, 1))
    bar.set_label("weight (scale: square root)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title + " " * bool(title) + "(below each head's name: the lag that gets more"
                    " than .3 of its weight, if there is one)", fontsize=9)
    return saved(figure, path)


# ==================================================================================================
# 6. Learning curves
@dataclasses.dataclass(eq=False)
class Curve:
    """log.csv of one run; `options` are those of its config.json, {} if there is none."""
    name: str
    options: dict
    columns: dict           # column -> (rows,) float64, NaN where a cell is empty
    path: Path = None       # of the log

    @staticmethod
    def read(path):
        """path: the folder of a run, or a .csv. Raises UsageError if there is no log."""
        path = Path(path)
        log = path if path.suffix == ".csv" else path / "log.csv"
        if not log.is_file():
            raise UsageError(f"{log} is not there; give folders that training runs wrote, or .csv")
        with open(log, newline="") as file:
            rows = list(csv.DictReader(file))
        try:
            columns = {name: np.array([float(row[name] or "nan") for row in rows])
                       for name in rows[0]}
            for name in ("env_steps", "return_mean", "return_std"):
                columns[name]
        except (IndexError, KeyError, ValueError, TypeError):
            raise UsageError(f"{log} is empty, or no log.csv of a run") from None
        config = log.with_name("config.json")
        known = log.name == "log.csv" and config.exists()
        options = json.loads(config.read_text()) if known else {}
        return Curve(log.stem if path.suffix == ".csv" else path.name, options, columns, log)


def find_runs(folder):
    """[Curve] of all runs in and below a folder, known by their config.json, in order of path.

    Of runs that differ in nothing that matters (the same seed, options, environment; one may have
    gone on for longer), only the longest: a kept agent carries the log of the run it came from.
    Folders whose name ends in -earlier, runs with an earlier default, are left out.
    """
    longest = {}
    for path in sorted(Path(folder).rglob("config.json")):
        if path.parent.name.endswith("-earlier"):
            continue
        curve = Curve.read(path.parent)
        same = json.dumps([look_up(curve.options["env"])[0], curve.options["seed"],
                           comparable(curve.options)], sort_keys=True)
        other = longest.setdefault(same, curve)
        if curve.columns["env_steps"][-1] > other.columns["env_steps"][-1]:
            longest[same] = curve
    return sorted(longest.values(), key=lambda curve: curve.path)


# What may differ between runs that are seeds of one experiment: not the learning rate, though that
# is free to change on --resume.
ALIKE = {"seed", "out", "resume", "eval", "render", "versions", "commit", "command", "env",
         *(field.name for field in dataclasses.fields(am.Config)
           if field.metadata["free"] and field.name != "lr")}


# What an option takes away from the algorithm, in words.
WORDS = {("relabel", "none"): "no relabeling", ("relabel", "all"): "relabel all",
         ("importance", "False"): "any goal as good", ("hide_plan", "True"): "plan hidden",
         ("memory", "1"): "no memory"}


def defaults(size="nano"):
    """As a config.json has them, but without what may differ between seeds of one experiment."""
    options = json.loads(json.dumps(dataclasses.asdict(am.Config(size=size))))
    return {name: value for name, value in options.items() if name not in ALIKE}


def comparable(options):
    """Those that tell one experiment from another, at their defaults where options, those of a
    config.json, do not name them. relabel: some and auto mean the same."""
    known = defaults(options.get("size", "nano"))
    known.update((name, value) for name, value in options.items() if name in known)
    if known["explore_steps"] == 200_000:      # what 0, the default, stands for in short rollouts
        known["explore_steps"] = 0
    return {**known, "relabel": "auto"} if known["relabel"] == "some" else known


def departures(options):
    """{option: words} for those that are not at their defaults: {'memory': 'no memory', 'tau':
    'tau 0.02'}"""
    own = comparable(options)
    words = {}
    for name, value in own.items():
        if value != {**defaults(own["size"]), "size": am.Config.size}[name]:
            words[name] = WORDS.get((name, str(value)), f"{name} {value}")
            if name == "gammas":
                words[name] = f"one gamma, {value[0]:g}" if len(value) == 1 else (
                    f"{len(value)} gammas, {value[0]:g} to {value[-1]:g}")
    return words


def group(curves):
    """{environment: {label: [Curve]}}: seeds of one experiment together. The label tells what was
    taken away from the algorithm, and how else it departs from the defaults if not all experiments
    in its environment do; "full" if in nothing, or "" for an experiment without others."""
    places = {}
    for curve in curves:
        env, _ = look_up(curve.options.get("env", ""))
        places.setdefault(env, []).append((curve, comparable(curve.options)))
    panels, taken = {}, {name for name, _ in WORDS} | {"gammas"}
    for env, members in places.items():
        differ = {name for _, own in members for name in own
                  if any(other[name] != own[name] for _, other in members)}
        groups = panels.setdefault(env, {})
        for curve, own in members:
            words = [word for name, word in departures(own).items() if name in differ | taken]
            label = ", ".join(words) or "full" * bool(differ)
            # Without a config.json nothing is known of a curve but its name.
            groups.setdefault(label if curve.options else curve.name, []).append(curve)
    return {env: dict(sorted(groups.items(), key=lambda item: item[0] != "full"))
            for env, groups in panels.items()}


def mean_and_spread(curves, column="return_mean"):
    """-> x, mean, lowest and highest of a column over the runs of one experiment, each (points,).

    Between evaluations it is interpolated; a run that has ended (it reached its target) keeps its
    last one. Of a single run: its mean, less and plus one standard deviation over episodes; of a
    share of successes, one standard error.
    """
    if len(curves) == 1:
        x, mean, std = (curves[0].columns[name] for name in ("env_steps", column, "return_std"))
        if column == "success":
            std = np.sqrt(mean * (1 - mean) / curves[0].options.get("episodes", 64))
        return x, mean, mean - std, mean + std
    x = np.unique(np.concatenate([curve.columns["env_steps"] for curve in curves]))
    y = np.stack([np.interp(x, curve.columns["env_steps"], curve.columns[column])
                  for curve in curves])
    return x, y.mean(0), y.min(0), y.max(0)


def plot_curves(runs, path=None, column="return_mean", columns=2, height=4.2, references=None,
                one_legend=False):
    """Return, or another column, against env steps, a panel for each environment, a line for each
    experiment.

    runs: Curves, or folders or .csv files; those that differ in nothing but the seed become one
    line. Shaded: from the lowest to the highest seed; of a single run, see mean_and_spread.
    references: {environment: {name of REFERENCES: y}}; for those not in it, its known returns.
    one_legend: for all panels, where the same experiment has the same colour.
    """
    panels = group([run if isinstance(run, Curve) else Curve.read(run) for run in runs])
    labels = list(dict.fromkeys(label or "full" for groups in panels.values() for label in groups))
    columns = min(len(panels), columns)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 0.3 + (1.2 * height if columns == 1 else height) * rows),
                    dpi=100 if one_legend else 120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (env, groups) in zip(grid.flat, panels.items()):
        known = look_up(env)[1] if column == "return_mean" else {}
        draw_curves(axes, env, groups, column, (references or {}).get(env, known),
                    labels if one_legend else None)
    for axes in grid.flat[len(panels):]:
        axes.set_axis_off()
    if one_legend:
        handles = {label: handle for axes in grid.flat[:len(panels)]
                   for handle, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8)
    return saved(figure, path)


@functools.cache
def look_up(name):
    """-> canonical name and known returns of an environment; of one that cannot be built here, none
    are known, and its log is drawn all the same."""
    try:
        env = environments.make_env(name)
        return env.name, env.references
    except (ValueError, ModuleNotFoundError):
        return name, {}


def draw_curves(axes, env, groups, column="return_mean", references=(), labels=None):
    """labels: those of all panels; given, numbers and the legend itself are left to the figure."""
    for name, y in dict(references).items():
        label, style = REFERENCES[name]
        axes.axhline(y, ls=style, color="0.35", lw=1.1,
                     label=label if labels else f"{label}: {y:.3g}")
    what = "std over episodes" if column == "return_mean" else "standard error"
    for i, (label, curves) in enumerate(groups.items()):
        i = labels.index(label or "full") if labels else i
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]
        x, mean, low, high = mean_and_spread(curves, column)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        count = (f"1 run, \u00b1 one {what}" if len(curves) == 1 else
                 f"{len(curves)} runs, lowest to highest")
        count = f"{label} ({count})" if label else count
        axes.plot(x, mean, color=colour, ls=style, lw=1.8, label=labels[i] if labels else count)
        for curve in curves:                                 # where each run ended
            axes.plot(curve.columns["env_steps"][-1], curve.columns[column][-1], "o", ms=4,
                      color=colour, mec="white", mew=0.6)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="environment steps", title=env.removeprefix("popgym:") if labels else env,
             ylabel=dict(return_mean="return per episode",
                         success="share of successes").get(column, column))
    axes.title.set_fontsize(9 if labels else 10)
    axes.grid(alpha=0.25)
    if not labels:
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17))


# ==================================================================================================
# 7. Success by goal
# Shares of episodes that reach a goal of crafter:instructions: the paper's Table 1; and uniformly
# random actions, at any time in an episode, over 5088 of them (858 878 steps; 0 where missing).
CRAFTER_PAPER = {
    "collect wood": .999, "collect drink": .999, "place plant": .993, "wake up": .999,
    "place table": .967, "make wood sword": .998, "eat cow": .966, "defeat zombie": .972,
    "make wood pickaxe": .998, "collect stone": .995, "place furnace": .942,
    "make stone pickaxe": .978, "make stone sword": .983, "collect coal": .901,
    "defeat skeleton": .765, "collect iron": 0.0}
CRAFTER_RANDOM = {
    **dict.fromkeys(CRAFTER_PAPER, 0.0), "wake up": .940, "collect sapling": .507,
    "place plant": .452, "collect wood": .241, "collect drink": .102, "place table": .043,
    "make wood pickaxe": .0024, "eat cow": .0024, "make wood sword": .0024,
    "defeat zombie": .0016, "eat plant": .0002, "defeat skeleton": .0002, "place stone": .0002,
    "collect stone": .0002}


def read_goals(path):
    """What `--eval DIR --instruction GOAL` printed for one goal after another -> {goal: (episodes
    that did it, episodes)}; see plot_goals."""
    pattern = r"[?&]instruction=(.*?) after .* over (\d+) episodes, success ([\d.]+)"
    return {goal: (round(int(number) * float(share)), int(number))
            for goal, number, share in re.findall(pattern, Path(path).read_text())}


def wilson(k, n, z=1.96):
    """k successes in n tries -> the ends of Wilson's 95 % interval for their chance."""
    p = k / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def plot_goals(done, path=None, title="", **references):
    """A bar for the share of successes of each goal, with its 95 % interval, beside references.

    done: {goal: (successes, episodes)}; references: random, paper = {goal: share}
    """
    figure = Figure(figsize=(WIDTH, 4.2), dpi=100, layout="constrained")
    axes, x = figure.subplots(), np.arange(len(done))
    share = np.array([k / n for k, n in done.values()])
    ends = np.array([wilson(k, n) for k, n in done.values()])
    axes.bar(x, share, 0.7, color=COLOURS[5], edgecolor=COLOURS[0], label="this agent")
    axes.errorbar(x, share, np.abs(ends.T - share), fmt="none", ecolor="k", elinewidth=1.2,
                  capsize=2, label="95 % interval")
    for (name, known), (colour, marker) in zip(references.items(), ((COLOURS[6], "_"),
                                                                    (COLOURS[1], "D"))):
        places = [i for i, goal in enumerate(done) if goal in known]
        axes.plot(places, [known[goal] for goal in done if goal in known], marker, color=colour,
                  ms=13 if marker == "_" else 5, mew=2 if marker == "_" else 0,
                  label=REFERENCES[name][0], clip_on=False, zorder=3)
    axes.set_xticks(x, done, rotation=40, ha="right", fontsize=8)
    axes.set(ylim=(0, 1.02), ylabel="share of episodes", title=title)
    axes.grid(axis="y", alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  fontsize=8)
    return saved(figure, path)


# [1] Table 1, "w/o Relabeling", after 32 million env steps; it has no row for saplings.
CRAFTER_NO_RELABELING = {
    "collect wood": .973, "collect drink": .792, "place plant": .999, "wake up": .045,
    "place table": .944, "make wood sword": 0.0, "eat cow": .152, "defeat zombie": .689,
    "make wood pickaxe": 0.0}


def plot_progress(tables, path=None, columns=5, **references):
    """Success against env steps, a panel for everything that was asked.

    tables: {label: file that tests/benchmarks/goals.py wrote}; references: {name: {goal: share}},
    a level line each
    """
    rows = {label: list(csv.DictReader(Path(file).read_text().splitlines()))
            for label, file in tables.items()}
    asked = list(dict.fromkeys(row["asked"] for table in rows.values() for row in table))
    height = -(-len(asked) // columns)
    figure = Figure(figsize=(WIDTH, 0.6 + 1.5 * height), dpi=100, layout="constrained")
    grid = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False).flat
    for goal, axes in zip(asked, grid):
        for i, (label, table) in enumerate(rows.items()):
            points = sorted((int(row["env_steps"]), float(row["success"]))
                            for row in table if row["asked"] == goal)
            axes.plot(*zip(*points), ls=STYLES[i], color=COLOURS[i], label=label)
        for (label, known), style in zip(references.items(), STYLES[2:]):
            if goal in known:
                axes.axhline(known[goal], color="k", lw=1, ls=style, label=label)
        axes.set_title(goal, fontsize=9)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in list(grid):                      # what no goal came to
        axes.axis("off")
    figure.supxlabel("env steps", fontsize=9)
    figure.supylabel("share of episodes", fontsize=9)
    labels = {label: line for axes in figure.axes
              for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=4, fontsize=8)
    return saved(figure, path)


# ==================================================================================================
# 8. Command line
def main(argv=None):
    """-> exit code: 0 done, 1 nothing could be written or replayed, 2 bad arguments"""
    parser = environments.Parser(prog="plots.py", description=__doc__.split("\n")[0])
    what = parser.add_subparsers(dest="what", required=True, metavar="attention|values|curves")
    for name, text in (("attention", "every head over one rollout"),
                       ("values", "V for each gamma over one rollout")):
        command = what.add_parser(name, help=text)
        command.add_argument("folder", help="of a training run")
        command.add_argument("out", help="picture to write: .png, .svg or .pdf")
        command.add_argument("--seed", type=int, default=0, help="which episode (default 0)")
    what.choices["attention"].add_argument("--steps", type=int, default=200,
                                           help="only the first so many steps (default 200)")
    curves = what.add_parser("curves", help="learning curves: mean and spread over seeds")
    curves.add_argument("runs", nargs="+", help="folders of training runs, or .csv files")
    curves.add_argument("out", help="picture to write: .png, .svg or .pdf")
    try:
        options = parser.parse_args(argv)
        check_file(options.out, (".png", ".svg", ".pdf"))
        if options.what == "curves":
            plot_curves(options.runs, options.out)
        else:
            config, agent, _ = am.load_checkpoint(options.folder)
            # Not below 2^31: seeds that no training has seen.
            trajectory = play(agent, config.env, config.context, 2**31 + options.seed)
            name = environments.make_env(config.env).name
            if options.what == "values":
                plot_values(agent, trajectory, name, options.out)
            else:
                weights = attention(agent, trajectory, options.steps)
                plot_attention(weights, name, options.out)
    except (UsageError, ModuleNotFoundError) as problem:
        print(f"plots.py: {problem}", file=sys.stderr)
        return 2
    except (BrokenEnvironment, OSError) as problem:
        print(f"plots.py stopped: {problem}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
