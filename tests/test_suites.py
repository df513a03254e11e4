"""From the command line to learned weights and back, in every suite of worlds. About 15 seconds.

tests/test_cli.py does the same with popgym:, gym: and meta:; those here are our own environments,
with goals in words, maps of textures and pictures.
"""

import csv
import importlib.metadata
import json

import gymnasium
import numpy as np
import pytest

import amago_min as am

SMALL = "--parallel-envs 2 --episodes 2 --batch 2 --replay-ratio 1 --threads 1".split()


class Flash(gymnasium.Env):
    """Pictures alone, as a gymnasium id: a bright field or a dark one, which has to be named."""
    observation_space = gymnasium.spaces.Box(0, 255, (20, 16, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def look(self):
        self.bright = int(self.np_random.integers(2))
        return np.full((20, 16, 3), 40 + 160 * self.bright, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.look(), {}

    def step(self, action):
        reward = float(action == self.bright)
        return self.look(), reward, False, False, {}


gymnasium.register("Flash-v0", entry_point=Flash, max_episode_steps=12)

WORLDS = {     # name -> its parts that come to the network by ways of their own
    "crafter:instructions?horizon=20": {"texture", "instruction"},
    "crafter:instructions?horizon=20&obs=pixels": {"image", "instruction"},
    "crafter:undirected?horizon=20": {"texture"},
    "crafter:undirected?horizon=20&obs=pixels": {"image"},
    "delivery:11": {"instruction"},
    "maze:5x5?goals=1": {"instruction"},
    "darkkey:3x3": set(),
    "tmaze:20": set(),
    "wind:": set(),
    "gym:Flash-v0": {"image"},
}


def watch(monkeypatch):
    """-> what a run that begins now fills: how often it relabeled a rollout; and for each weight
    that learns, whether a gradient ever came to it."""
    seen, relabel, begin = dict(relabeled=0, moved={}), am.relabel, am.Learner.begin_update

    def watched_relabel(*given):
        seen["relabeled"] += 1
        return relabel(*given)

    def watched_update(learner, batch):
        begin(learner, batch)
        for name, p in learner.agent.named_parameters():
            if p.requires_grad:
                seen["moved"][name] = seen["moved"].get(name, False) or bool(p.grad.abs().max() > 0)
    monkeypatch.setattr(am, "relabel", watched_relabel)
    monkeypatch.setattr(am.Learner, "begin_update", watched_update)
    return seen


@pytest.mark.parametrize("name", WORLDS)
def test_a_run_from_the_command_line_to_an_evaluation(name, tmp_path, monkeypatch, capsys):
    """Catches a world that cannot be trained on, an input that never reaches the loss, goals that
    are not relabeled, and an agent that cannot be loaded and evaluated again."""
    monkeypatch.chdir(tmp_path)
    seen, env = watch(monkeypatch), am.environments.make_env(name)
    spec, steps = am.Spec.of(env), 2 * env.horizon + 6
    assert {x for x in ("texture", "image", "instruction") if getattr(spec, x)} == WORLDS[name]
    assert am.main(["--env", name, "--env-steps", str(steps), "--out", "run", *SMALL]) == 0
    with open("run/log.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert int(last["updates"]) >= 1 and float(last["critic_loss"]) > 0
    assert bool(seen["relabeled"]) == ("instruction" in WORLDS[name])
    assert [weight for weight, moved in seen["moved"].items() if not moved] == []
    ways = {weight.split(".")[1] for weight in seen["moved"] if weight.startswith("encoder.")}
    assert ways - {"norm", "mlp"} == WORLDS[name]

    score = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert score["env"] == env.name
    assert "instruction" not in WORLDS[name] or score["success"] is not None
    versions = json.loads((tmp_path / "run" / "config.json").read_text())["versions"]
    assert {"python", "torch", "numpy", "gymnasium", "popgym", "crafter"} <= set(versions)
    assert versions["crafter"] == importlib.metadata.version("crafter")
    capsys.readouterr()
    assert am.main(["--eval", "run", "--episodes", "2", "--threads", "1"]) == 0
    assert f"{name} after {score['env_steps']:,} env steps: return" in capsys.readouterr().out
