"""What an agent of crafter:instructions learns, goal by goal, in the course of its training.

    python tests/benchmarks/goals.py keep runs/crafter/full-0       # while it trains, until Ctrl-C
    python tests/benchmarks/goals.py test runs/crafter/full-0 FILE.csv --every 100000

`keep` saves the agent of every checkpoint as agents/ENV_STEPS.pt in the run's folder. `test` plays
--episodes with each single goal and --drawn with instructions as the task draws them, and appends
what is not in the file yet: env_steps, updates, asked ("eat cow", or "3 goals" for all drawn
instructions that long), episodes, success.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
import torch
import amago_min as am
import envs

GOALS = ("collect sapling", "place plant", "collect wood", "place table", "collect drink",
         "eat cow", "wake up", "defeat zombie", "make wood pickaxe")
COLUMNS = ("env_steps", "updates", "asked", "episodes", "success")


def keep(run):
    """The agent of every new checkpoint -> run/agents/ENV_STEPS.pt, until Ctrl-C."""
    (run / "agents").mkdir(exist_ok=True)
    seen = None
    while True:
        checkpoint = run / "checkpoint.pt"                    # the first comes after ten minutes
        changed = checkpoint.stat().st_mtime if checkpoint.exists() else seen
        if changed != seen:
            state = torch.load(checkpoint, weights_only=True, mmap=True)
            torch.save(dict(agent=state["learner"]["average"], config=state["config"],
                            env_steps=state["env_steps"], updates=state["learner"]["updates"]),
                       run / "agents" / f"{state['env_steps']:08}.pt")
            seen = changed
        time.sleep(30)


def play(agent, env, context, episodes):
    """-> [(number of goals, success)] of whole episodes, a fixed number in each environment"""
    torch.manual_seed(0)
    n_envs = min(episodes, 32)
    collector = am.Collector(env, n_envs, agent, context, seed=2**31)
    left, out = [episodes // n_envs + (i < episodes % n_envs) for i in range(n_envs)], []
    while any(count > 0 for count in left):
        for i, trajectory in collector.step():
            if left[i] > 0:
                goals = (trajectory.obs["instruction"][0, :, 1] != 0).sum()
                out.append((int(goals), trajectory.success))
            left[i] -= 1
    return out


def test(path, episodes, drawn, done):
    """Rows for the agent in `path`, one after the other; done: (env_steps, asked) to leave out"""
    state = torch.load(path, weights_only=True)
    config = am.Config(**state["config"])
    agent = am.Agent(am.Spec.of(envs.make_env(config.env)), config).eval()
    agent.load_state_dict(state["agent"])
    agent.keep()
    when = state["env_steps"], state["updates"]
    for goal in GOALS:
        if (str(when[0]), goal) not in done:
            env = envs.fix_instruction(config.env, goal)
            success = [won for _, won in play(agent, env, config.context, episodes)]
            yield *when, goal, episodes, sum(success) / episodes
    if (str(when[0]), "1 goal") not in done:
        played = play(agent, config.env, config.context, drawn)
        for k in sorted({k for k, _ in played}):
            success = [won for goals, won in played if goals == k]
            yield *when, f"{k} goal{'s' * (k > 1)}", len(success), sum(success) / len(success)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("keep", "test"))
    parser.add_argument("run", type=Path)
    parser.add_argument("file", type=Path, nargs="?", help="test: the table to go on with")
    parser.add_argument("--every", type=int, default=1, help="env steps between the agents tested")
    parser.add_argument("--episodes", type=int, default=50, help="with each single goal")
    parser.add_argument("--drawn", type=int, default=200, help="with drawn instructions")
    options = parser.parse_args()
    if options.what == "keep":
        keep(options.run)
    there = options.file.read_text().splitlines() if options.file.exists() else []
    done = {(row["env_steps"], row["asked"]) for row in csv.DictReader(there)}
    last = -options.every
    for path in sorted((options.run / "agents").glob("*.pt")):
        if int(path.stem) - last < options.every:
            continue
        last = int(path.stem)
        for row in test(path, options.episodes, options.drawn, done):
            with open(options.file, "a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    writer.writerow(COLUMNS)
                writer.writerow([*row[:4], f"{row[4]:.4g}"])
            print(*row, flush=True)


if __name__ == "__main__":
    sys.exit(main())
