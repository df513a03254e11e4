"""The long runs behind notebooks/results/: the paper's worlds, the ablations, Crafter.

    python tests/benchmarks/evidence.py --list                  # what it runs, and each command
    python tests/benchmarks/evidence.py worlds ablations        # those that are not there yet
    python tests/benchmarks/evidence.py ablations/delivery-full --jobs 2 --minutes 60

Each run is one command with default options, but for its budget and what its name says, on one
thread. --jobs of them at a time; Ctrl-C or --minutes stops them with everything saved, and the same
line goes on where they were. What a finished run says about itself (config.json, log.csv,
eval.json) goes to notebooks/results/, its agent stays in runs/; `notebooks/keep.py` makes it small.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS, RESULTS = ROOT / "runs", ROOT / "notebooks" / "results"

# The paper's ablations, each one flag.
ARMS = {"full": "", "no-relabeling": "--relabel none", "one-gamma": "--gammas .999",
        "no-memory": "--memory 1", "relabel-all": "--relabel all"}
ARM_SEEDS = [(arm, seed) for seed in range(3) for arm in ARMS
             if seed == 0 or arm in ("full", "no-relabeling")]
TASKS = {"delivery": "--env delivery:30 --env-steps 500000",
         "maze": "--env maze:11x11?goals=3 --env-steps 300000"}
JOBS = {
    **{f"worlds/tmaze-100-{seed}": f"--env tmaze:100 --seed {seed}" for seed in range(3)},
    "worlds/tmaze-400-0": "--env tmaze:400 --env-steps 1500000",
    "worlds/tmaze-500-0": "--env tmaze:500",
    "worlds/tmaze-700-0": "--env tmaze:700 --env-steps 1230000",
    "worlds/tmaze-100-0-on": "--env tmaze:100 --env-steps 210000 --target-return none",
    "worlds/maze-7x7-goals-1-0-on":
        "--env maze:7x7?goals=1 --env-steps 80000 --target-return none",
    "worlds/maze-7x7-goals-2-0-on":
        "--env maze:7x7?goals=2 --env-steps 75000 --target-return none",
    "worlds/maze-7x7-goals-1-0": "--env maze:7x7?goals=1 --env-steps 300000 --target-return .98",
    "worlds/maze-7x7-goals-2-0": "--env maze:7x7?goals=2 --env-steps 500000 --target-return 1.46",
    **{f"worlds/wind-{seed}": f"--env wind: --env-steps 1500000 --seed {seed}"
       for seed in range(3)},
    "worlds/darkkey-5x5-0": "--env darkkey:5x5 --env-steps 1500000",
    "worlds/darkkey-9x9-0": "--env darkkey:9x9 --env-steps 1200000",
    "worlds/maze-15x15-0": "--env maze:15x15 --env-steps 800000",
    "worlds/maze-30x30-0": "--env maze:30x30 --env-steps 2100000",
    "worlds/crafter-undirected-0": "--env crafter:undirected --env-steps 600000",
    "worlds/cheetah-vel-0": "--env cheetah:vel --env-steps 1250000",
    "worlds/metaworld-reach-0": "--env metaworld:reach --env-steps 2100000",
    "worlds/metaworld-ml45-0": "--env metaworld:ML45 --env-steps 2100000",
    **{f"ablations/{task}-{arm}-{seed}": f"{what} {ARMS[arm]} --seed {seed}".replace("  ", " ")
       for arm, seed in ARM_SEEDS for task, what in TASKS.items()},
    **{f"crafter/{arm}-0": f"--env crafter:instructions --env-steps 4000000 {ARMS[arm]}".strip()
       for arm in ("full", "no-relabeling")},
    "long/delivery-30-0": "--env delivery:30 --env-steps 2600000",     # as many as in the paper
}


def start(name):
    """Begin the run, or go on with it."""
    folder = RUNS / name
    if (folder / "checkpoint.pt").exists():
        options = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)              # it never came to a checkpoint
        options = [*shlex.split(JOBS[name]), "--threads", "1", "--out", str(folder)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M')} {name}: amago_min.py {' '.join(options)}", flush=True)
    with open(f"{folder}.txt", "a") as console:
        return subprocess.Popen([sys.executable, str(ROOT / "amago_min.py"), *options],
                                stdout=console, stderr=console, start_new_session=True,
                                env=dict(os.environ, OMP_NUM_THREADS="1"))


def finish(name, code):
    """A run that ended by itself goes to the results; returns whether it failed."""
    print(f"{time.strftime('%H:%M')} {name}: exit code {code}", flush=True)
    if code == 0:
        (RESULTS / name).mkdir(parents=True)
        for file in ("config.json", "log.csv", "eval.json"):
            text = (RUNS / name / file).read_text().replace(f"{ROOT}/", "")
            (RESULTS / name / file).write_text(text)
    return code not in (0, 130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="what their names begin with; all if none")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop them all after so long")
    options = parser.parse_args()
    waiting = [name for name in JOBS if name.startswith(tuple(options.names or [""]))]
    if options.list or not waiting:
        print("\n".join(f"{name}: python amago_min.py {JOBS[name]} --threads 1" for name in JOBS))
        return 0 if options.list else 2
    waiting = [name for name in waiting if not (RESULTS / name).exists()]
    running, failed, stop = {}, False, threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    timer = threading.Timer(60 * options.minutes, stop.set)
    timer.daemon = True
    timer.start()
    while running or waiting and not stop.is_set():
        if stop.is_set() and waiting is not None:
            waiting = None
            for process in running.values():
                process.send_signal(signal.SIGTERM)           # it saves everything
        while waiting and len(running) < options.jobs:
            name = waiting.pop(0)
            running[name] = start(name)
        for name, process in list(running.items()):
            if process.poll() is not None:
                failed |= finish(name, running.pop(name).returncode)
        time.sleep(1)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
