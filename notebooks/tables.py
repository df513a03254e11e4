"""README's tables of results, from the logs in notebooks/results/.

    python notebooks/tables.py                     # print them all
    python notebooks/tables.py popgym ablations    # these
    python tests/test_docs.py                      # write those that README.md has into it

A run is a folder with the config.json and log.csv that `amago_min.py` wrote. One that is not there
gives no row.
"""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from envs import UsageError  # noqa: E402 (after the path)
from notebooks import plots  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
# Runs with earlier defaults are marked in the tables. Today attention begins sharper in the first
# layer, see Transformer; in runs of these commits it did in none (a star) or in all (a plus).
# Today noise fades over 2000 rollouts, if these have more than 200 000 env steps, over which it did
# before (a degree sign, where that differs by more than 5 %). Today the active goal stands in front
# of the instruction once more (a dagger where it did not).
IN_NONE = ("305775d", "36f03bf", "398604f", "5f12ac0", "9512566", "ba40cfc", "dfcdd00", "f042dc4")
IN_ALL = ("d11a520",)
NOT_IN_FRONT = (*IN_NONE, *IN_ALL, "e6351a8")


def runs_in(*folders):
    """[Curve] of every run below these folders of notebooks/results/, by path."""
    curves = []
    for folder in folders:
        for config in sorted((RESULTS / folder).rglob("config.json")):
            try:
                curves.append(plots.Curve.read(config.parent))
            except UsageError as problem:              # no log, or an empty one
                print(f"tables.py: left out: {problem}", file=sys.stderr)
    return curves


def markdown(header, rows):
    """header: titles, ':' after those of columns of numbers; rows of cells -> a table as text."""
    lines = [[title.rstrip(":") for title in header],
             ["---:" if title.endswith(":") else "---" for title in header], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(x, digits=2):
    """'.97', '1.00', '-.5', '109' as in running text; '-' for nothing."""
    if x is None or math.isnan(x):
        return "-"
    if abs(x) >= 10:
        return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}"
    return f"{x:.{digits}f}".replace("0.", ".", 1) if abs(x) < 1 else f"{x:.{digits}f}"


def minutes(seconds):
    """Few enough digits to compare, as many as it takes to see seconds."""
    return f"{seconds / 60:.2f}" if seconds < 60 else f"{seconds / 60:.1f}"


def env_of(curve):
    """Its canonical name, without 'popgym:', options that are not at their defaults, and marks on a
    run with earlier defaults."""
    name = plots.look_up(curve.options["env"])[0].removeprefix("popgym:")
    return ", ".join([name, *plots.departures(curve.options).values()]) + marks([curve])


def optional(curve):
    """Whether its environment needs a package that may not be here: its known returns are left out
    then, so that a table is the same everywhere."""
    return curve.options["env"].startswith(("cheetah:", "metaworld:"))


def marks(curves):
    """Those of earlier defaults on any of these runs, each behind a space."""
    found = set()
    for curve in curves:
        if optional(curve):                            # there are none with earlier defaults
            continue
        commit, explore = (curve.options.get(x, "") for x in ("commit", "explore_steps"))
        env = plots.environments.make_env(curve.options["env"])
        instructed = "instruction" in getattr(env.observation_space, "spaces", ())
        found |= {mark for mark, there in (
            ("*", commit.startswith(IN_NONE)), ("+", commit.startswith(IN_ALL)),
            ("\u00b0", explore == 200_000 and 2000 * env.horizon > 1.05 * explore),
            ("\u2020", instructed and commit.startswith(NOT_IN_FRONT))) if there}
    return "".join(f" {mark}" for mark in sorted(found))


def at(curve, i):
    """Cells for evaluation i, None if there is none: env steps, updates, minutes."""
    if i is None:
        return ["-"] * 3
    x = {name: curve.columns[name][i] for name in ("env_steps", "updates", "seconds")}
    return [f"{x['env_steps']:,.0f}", f"{x['updates']:,.0f}", minutes(x["seconds"])]


# ---- POPGym ----

POPGYM_HEADER = ("environment", "seed", "best:", "paper:", "reached: env steps:", "updates:",
                 "minutes:", "in all: env steps:", "updates:", "minutes:")


def popgym_row(curve):
    """Reached is the first evaluation of at least the paper's return less 0.02; best, the best of
    all evaluations, as the paper counts."""
    returns = curve.columns["return_mean"]
    paper = plots.look_up(curve.options["env"])[1].get("paper", math.nan)
    reached = next((i for i, x in enumerate(returns) if x >= paper - 0.02), None)
    return [env_of(curve), curve.options["seed"], f"{returns.max():.3f}",
            "-" if math.isnan(paper) else f"{paper:.3f}", *at(curve, reached), *at(curve, -1)]


def popgym():
    """What the defaults reach on POPGym, beside the paper."""
    def order(curve):                                  # environments by how soon they were done
        name = env_of(curve)
        return first[name], name, curve.options["seed"]
    curves, first = runs_in("popgym"), {}
    for curve in curves:
        first[env_of(curve)] = min(first.get(env_of(curve), math.inf),
                                   curve.columns["env_steps"][-1])
    return markdown(POPGYM_HEADER, [popgym_row(curve) for curve in sorted(curves, key=order)])


# ---- Positions ----

LEVELS, POSITIONS = ("Easy", "Medium", "Hard"), ("both", "rotary", "sinusoidal", "learnable")


def positions():
    """Return at the end, and env steps to .99, for each kind of positions; one part per seed."""
    cells = {}
    for curve in sorted(runs_in("positions"), key=lambda curve: curve.options["seed"]):
        env = plots.look_up(curve.options["env"])[0]
        level = next(level for level in LEVELS if env.endswith(level))
        score, steps = (curve.columns[name][-1] for name in ("return_mean", "env_steps"))
        what = f"**.99** after {steps:,.0f}" if score >= .99 else f"{number(score)} at {steps:,.0f}"
        cells.setdefault((level, curve.options["positions"]), []).append(
            f"{curve.options['seed']}: {what}")
    rows = [[f"`{how}`", *("<br>".join(cells.get((level, how), ["not run"])) for level in LEVELS)]
            for how in POSITIONS if any((level, how) in cells for level in LEVELS)]
    return markdown(["positions", *(f"{level}, seed: return" for level in LEVELS)], rows)


# ---- Other worlds ----


def worlds(earlier=False):
    """One row per run of the other environments: best and last evaluation. earlier: those with
    earlier defaults alone, else those without."""
    header = ("environment", "seed", "best return:", "at the end:", "success:", "env steps:",
              "updates:", "minutes:", "random:", "best known:")
    rows = []
    for curve in runs_in("worlds", "crafter", "long"):
        if bool(marks([curve])) != earlier:
            continue
        known = {} if optional(curve) else plots.look_up(curve.options["env"])[1]
        returns, success = curve.columns["return_mean"], curve.columns["success"][-1]
        rows.append([env_of(curve), curve.options["seed"], number(returns.max()),
                     number(returns[-1]), number(success), *at(curve, -1),
                     number(known.get("random")), number(known.get("best"))])
    return markdown(header, rows)


def earlier():
    """The runs that `worlds` leaves out, in notebooks/results/notes.md."""
    return worlds(earlier=True)


# ---- Ablations ----


def spread(values):
    """'.42', or of several seeds their mean, lowest and highest: '.42 (.40 to .45)'."""
    mean = number(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({number(min(values))} to {number(max(values))})"


def ablations():
    """One row per experiment: what was taken away, and what is left after the last evaluation that
    all experiments in its environment have come to."""
    header = ("environment", "taken away", "seeds", "env steps:", "updates:", "return:",
              "success:", "minutes each:")
    rows = []
    for env, groups in plots.group(runs_in("ablations")).items():
        steps = min(curve.columns["env_steps"][-1] for members in groups.values()
                    for curve in members)
        for label, members in groups.items():
            last = [(curve, curve.columns["env_steps"].searchsorted(steps, "right") - 1)
                    for curve in members]
            rows.append([env + marks(members), "nothing" if label in ("", "full") else label,
                         " ".join(sorted(str(curve.options["seed"]) for curve in members)),
                         f"{steps:,.0f}",
                         f"{statistics.mean(x.columns['updates'][i] for x, i in last):,.0f}",
                         *(spread([curve.columns[name][i] for curve, i in last])
                           for name in ("return_mean", "success")),
                         minutes(statistics.mean(curve.columns["seconds"][i]
                                                 for curve, i in last))])
    return markdown(header, rows)


TABLES = {table.__name__: table
          for table in (popgym, positions, worlds, earlier, ablations)}

if __name__ == "__main__":
    if wrong := set(sys.argv[1:]) - set(TABLES):
        sys.exit(f"tables.py: no table {min(wrong)!r}; there are {', '.join(TABLES)}")
    for name in sys.argv[1:] or TABLES:
        print(f"{name}\n\n{TABLES[name]()}\n")
