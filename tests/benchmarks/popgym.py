"""What the default options reach on POPGym, beside the paper.

    python tests/benchmarks/popgym.py --main-job                     # RepeatPrevious, seeds 0 1 2
    python tests/benchmarks/popgym.py --minutes 35                   # eight environments, seed 0
    python tests/benchmarks/popgym.py --envs popgym:CountRecallEasy --out runs/lr -- --lr 5e-4
    python tests/benchmarks/popgym.py --table runs/popgym            # only read what is there

Each run is `python amago_min.py --env X --seed S --out FOLDER` and gives one row, that of README's
table (see notebooks/tables.py). A run whose folder is there already is read and not run again.
"""

import argparse
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)         # in place of this folder, where this file would hide the package
from envs import UsageError  # noqa: E402 (after the path)
from notebooks import plots, tables  # noqa: E402

EIGHT = [f"popgym:{name}" for name in (
    "RepeatFirstEasy", "AutoencodeEasy", "CountRecallEasy", "PositionOnlyCartPoleEasy",
    "PositionOnlyPendulumEasy", "HigherLowerEasy", "MultiarmedBanditEasy",
    "RepeatPreviousMedium")]


def run(env, seed, folder, minutes, more):
    """One training run; after `minutes` it is told to stop, which it does with everything saved."""
    command = [sys.executable, str(ROOT / "amago_min.py"), "--env", env, "--seed", str(seed),
               "--out", str(folder), *more]
    print("$", " ".join(command), file=sys.stderr)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        process.wait(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    except KeyboardInterrupt:                   # Ctrl-C has reached the run, too: let it save
        process.wait()
        raise
    if process.wait() not in (0, 130):
        sys.exit(f"{env}, seed {seed}: exit code {process.returncode}")
    return time.perf_counter() - start


def row_of(folder):
    try:
        return tables.popgym_row(plots.Curve.read(folder))
    except UsageError as problem:
        return [problem]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--envs", nargs="+", default=EIGHT)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--main-job", action="store_true",
                        help="RepeatPreviousEasy, seeds 0 1 2, with wall time and peak memory")
    parser.add_argument("--minutes", type=float, default=35, help="limit for each run, wall time")
    parser.add_argument("--out", type=Path, default=Path("runs/popgym"))
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="run nothing, read its runs")
    parser.add_argument("more", nargs="*", help="after --: options of amago_min.py, to compare")
    options = parser.parse_args()
    names, seeds = options.envs, options.seeds or [0]
    if options.main_job:
        names, seeds = ["popgym:RepeatPreviousEasy"], options.seeds or [0, 1, 2]
    folders = sorted(path.parent for path in options.table.glob("*/config.json")) if options.table \
        else [options.out / f"{name.partition(':')[2]}-{seed}" for name in names for seed in seeds]
    jobs = [(name, seed) for name in names for seed in seeds]

    print(tables.markdown(tables.POPGYM_HEADER, []))
    walls = []
    for i, folder in enumerate(folders):
        if not (folder / "config.json").exists():
            walls.append(run(*jobs[i], folder, options.minutes, options.more))
        print("|", " | ".join(map(str, row_of(folder))), "|", flush=True)
    if options.main_job and walls:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10   # Linux: kilobytes
        print(f"\nThe whole command, wall time: {', '.join(f'{x:.1f} s' for x in walls)};"
              f" the largest peak memory: {peak:.0f} MB")


if __name__ == "__main__":
    main()
