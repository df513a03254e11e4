"""Keep a trained agent, small enough for git: without its replay buffer, optimiser and targets.

    python notebooks/keep.py RUN FOLDER
    python amago_min.py --eval FOLDER --render episode.gif

FOLDER gets what RUN says about itself (config.json, log.csv, eval.json) and a checkpoint.pt that
--eval reads. It cannot be resumed: what it had lived through is not in it.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import amago_min as am  # noqa: E402 (after the path)
from envs import UsageError  # noqa: E402


def keep(run, folder):
    """-> the size of the new checkpoint in bytes. UsageError if there is none in `run`, or one in
    `folder` already."""
    run, folder = Path(run), Path(folder)
    _, _, state = am.load_checkpoint(run)
    if (folder / "checkpoint.pt").exists():
        raise UsageError(f"{folder} holds an agent already; remove it, or choose another folder")
    # What acts is kept bit by bit; critics, which only draw V, in half precision. Target networks
    # are for learning: under their names the online ones again, which a file of tensors holds once.
    agent = {name: x.half() if name.startswith("critics.") else x
             for name, x in state["learner"]["average"].items()}
    agent = {name: agent[name.removeprefix("target_")] for name in agent}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "log.csv", "eval.json"):
        shutil.copy(run / name, folder)
    am.save_checkpoint(folder / "checkpoint.pt", {
        **{name: state[name] for name in ("version", "spec", "env_steps")},
        "config": {**state["config"], "out": ""},
        "learner": {"average": agent}, "processes": {}})
    return (folder / "checkpoint.pt").stat().st_size


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(f"{sys.argv[2]}/checkpoint.pt: {keep(*sys.argv[1:]):,} bytes")
    except UsageError as problem:
        print(f"keep.py: {problem}", file=sys.stderr)
        sys.exit(2)
