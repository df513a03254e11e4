"""What relabeling costs beside an update of size small, one thread, 24 rollouts of 500 steps:

    python tests/benchmarks/relabel.py                # half a minute; the goal is below 15 %

What was tried: CPU milliseconds, maze-like, scheme some, on a busy AMD EPYC; an update takes 1450.
    statuses written when one changes, completed goals read off the rewards    45.6 -> 10.0     kept
    one array of rarities in place of one per step                            187.7 -> 30.5     kept
"""

import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
import numpy as np
import torch

import amago_min as am
import envs

BATCH, T = 24, 500


def maze_like(rng):
    """A random walk in an open 31x31 field for 3 far goals: every step reaches its cell."""
    cells = np.clip(15 + rng.integers(-1, 2, size=(T, 2)).cumsum(0), 1, 28)
    return rng.integers(29, 30, size=(3, 2)), cells[:, None]


def crafter_like(rng):
    """5 goals like Crafter's; a step reaches a place with p = .3, something else with p = .05."""
    reached = np.zeros((T, 4, 3), np.int64)
    places = np.stack([np.full(T, 6), 25 + np.arange(T) // 60, 30 + np.arange(T) // 90], 1)
    others = 1 + rng.zipf(1.6, size=(T, 1)).clip(max=20) * np.array([[1, 2, 0]])
    for rows, share in ((places, .3), (others, .05)):
        for t in np.flatnonzero(rng.random(T) < share):
            reached[t, (reached[t, :, 0] != 0).sum()] = rows[t]
    return rng.integers(50, 60, size=(5, 3)), reached


def rollout(goals, reached, vector, rng):
    """A failed one: none of `goals` was met."""
    shown = envs.show_instruction(goals.astype(np.int32), 0)
    return am.Trajectory(
        dict(vector=rng.normal(size=(T + 1, vector)), instruction=np.tile(shown, (T + 1, 1, 1))),
        rng.integers(5, size=T), np.zeros(T), np.arange(T) == T - 1, np.arange(T + 1) == 0, reached)


def milliseconds(call, repeats):
    """The median of so many calls, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)


def main():
    am.set_up_memory()
    torch.set_num_threads(1)
    print(f"{BATCH} rollouts of {T} steps, CPU milliseconds, medians\n"
          f"{'':14}{'scheme':>8}{'rarity':>8}{'relabel':>9}{'update':>8}{'share':>8}")
    for name, make, vector in (("maze-like", maze_like, 6), ("Crafter-like", crafter_like, 84)):
        rng, rarity = np.random.default_rng(0), envs.GoalRarity()
        rollouts = [rollout(*make(rng), vector, rng) for _ in range(48)]
        K, W = rollouts[0].obs["instruction"].shape[1:]
        spec = am.Spec(vector=vector, instruction=(K, W, 64), actions=5, horizon=T,
                       achieved=rollouts[0].achieved.shape[1:])
        buffer = am.ReplayBuffer(spec, 48 * (T + 1), rng)
        for trajectory in rollouts:
            buffer.add(trajectory)
            rarity.update(trajectory.achieved)
        config = am.Config(size="small")
        learner = am.Learner(am.Agent(spec, config).eval(), config)

        def sample(scheme=None, rare=None):
            buffer.relabel = scheme and (lambda trajectory: am.relabel(
                trajectory, envs.instruction_reward, envs.show_instruction, rng, scheme, rare))
            return buffer.sample(BATCH, T)
        plain = milliseconds(sample, 30)
        batch = sample()
        update = milliseconds(lambda: learner.update(batch), 5)
        for scheme in ("some", "all"):
            for rare in (None, rarity):
                extra = milliseconds(lambda: sample(scheme, rare), 30) - plain
                print(f"{name:14}{scheme:>8}{'yes' if rare else 'no':>8}{extra:9.1f}{update:8.0f}"
                      f"{extra / (update + plain):8.1%}")


if __name__ == "__main__":
    main()
