"""The command line: what a run leaves behind; bad input, environments that break, Ctrl-C."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
import torch

import amago_min as am
from probes import Choice, Constant, Probe, use

PROGRAM = pathlib.Path(am.__file__)
SMALL = ["--parallel-envs", "2", "--episodes", "2", "--batch", "4"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.reader(file))


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def finite(state):
    return all(torch.isfinite(x).all() for x in state["learner"]["agent"].values())


# ---- a run and its files (T21) ----

ENVS = {  # name: (longest rollout, what is special)
    "popgym:RepeatPrevious": 51,                        # discrete
    "popgym:PositionOnlyPendulumHard": 100,             # continuous actions
    "popgym:MineSweeper": 14,                           # MultiDiscrete actions
    "popgym:Autoencode": 103,                           # Tuple observations
    "gym:CartPole-v1": 40,                              # any gymnasium id
    "meta:popgym:MineSweeper?episodes=3": 42,           # several episodes in one rollout
}


@pytest.mark.parametrize("env", ENVS)
def test_a_short_run_leaves_its_files(env, tmp_path, capsys):
    """Catches a kind of environment that cannot be trained on, or a file that is not as promised;
    and an evaluation of the saved agent that differs from the same one in Python."""
    steps = 2 * ENVS[env] + 8
    assert am.main(["--env", env, "--env-steps", str(steps), "--out", "run", *SMALL]) == 0
    out = tmp_path / "run"
    assert {path.name for path in out.iterdir()} == {
        "config.json", "log.csv", "curve.png", "checkpoint.pt", "eval.json"}

    header, *rows = rows_of(out)
    assert header == list(am.environments.COLUMNS) and all(len(row) == len(header) for row in rows)
    last = {name: float(x or "nan") for name, x in zip(header, rows[-1])}
    assert last["env_steps"] >= steps and last["updates"] >= 1 and last["critic_loss"] > 0

    score = json.loads((out / "eval.json").read_text())
    assert list(score) == ["env", "return_mean", "return_std", "success", "episodes", "env_steps",
                           "updates", "train_seconds", "seed"]
    assert score["return_mean"] == pytest.approx(last["return_mean"], rel=1e-5)
    options = json.loads((out / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(am.Config)} < set(options)
    assert options["env"] == env and options["env_steps"] == steps
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")

    assert finite(saved(out))
    capsys.readouterr()
    assert am.main(["--eval", "run", "--episodes", "4", "--seed", "5"]) == 0
    config, agent, state = am.load_checkpoint(out)
    assert config.env == env and state["learner"]["updates"] == last["updates"]
    again = am.evaluate(agent, env, 4, config.context, seed=2**31 + 5)
    printed = capsys.readouterr().out
    assert f"return {again['return_mean']:.3f} +- {again['return_std']:.3f} over 4" in printed
    inner = "inner episodes " + " ".join(f"{x:.3g}" for x in again["inner_returns"])
    assert (inner in printed) == env.startswith("meta:")


def test_a_checkpoint_holds_what_was_learned(tmp_path, monkeypatch):
    """Catches a tensor that is not saved, or not loaded."""
    use(monkeypatch, Choice)
    agents = []
    save = am.save_run
    monkeypatch.setattr(am, "save_run", lambda folder, run, *rest: (
        agents.append(run["learner"].average), save(folder, run, *rest)))
    folder = am.train(am.Config(env="probe", env_steps=100, replay_ratio=2., out="run"))
    config, agent, state = am.load_checkpoint(folder)
    assert config == am.Config(**dataclasses.asdict(config)) and not agent.training
    for (name, x), y in zip(agents[-1].state_dict().items(), agent.state_dict().values()):
        assert torch.equal(x, y), name
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.parametrize("room", [100, 150, 300])
def test_a_small_buffer_is_learned_from(room, monkeypatch, tmp_path):
    """Catches a run that waits for as many rollouts as environments in a buffer with no room for so
    many, and never learns."""
    use(monkeypatch, Choice, horizon=50)
    assert am.main(["--env", "probe", "--buffer-steps", str(room), "--env-steps", "1600", "--out",
                    "run", *SMALL, "--parallel-envs", "16"]) == 0
    assert int(rows_of(tmp_path / "run")[-1][1]) > 0


def test_training_stops_at_the_target_return(tmp_path, monkeypatch):
    """Catches a run that goes on after the goal, and `none` that stops nevertheless."""
    use(monkeypatch, Constant, max_return=1)              # whose return is 1, trained or not
    for target, stops in (("0.5", True), ("auto", True), ("2", False), ("none", False)):
        out = tmp_path / target
        assert am.main(["--env", "probe", "--env-steps", "20", "--target-return", target,
                        "--out", str(out), *SMALL]) == 0
        assert (rows_of(out)[-1][0] == "0") == stops


def test_the_goal_is_one_percent_below_the_maximum():
    """Catches a goal that is out of reach, also where the maximum is negative or unknown."""
    for best, goal in ((1, 0.99), (-100, -101), (None, math.inf)):
        env = Probe()
        env.max_return = best
        assert am.environments.stopping_return(am.Config(), env) == pytest.approx(goal)


def test_every_step_is_replayed_as_often_as_asked(tmp_path, monkeypatch):
    """Catches a ratio that counts updates, rollouts or environments instead of steps."""
    use(monkeypatch, Choice)                              # 1 step per rollout: 8 steps per update
    assert am.main("--env probe --env-steps 100 --parallel-envs 10 --batch 8 --replay-ratio 4"
                   " --episodes 1 --out run".split()) == 0
    assert saved(tmp_path / "run")["learner"]["updates"] == (90 - 10) * 4 / 8   # 90 in the buffer


def test_environments_step_while_an_update_is_computed(tmp_path, monkeypatch):
    """Catches a GPU that is waited for with nothing else done meanwhile, and an update that is not
    over when its agent acts, is evaluated or is saved: `*` is said by who comes in the middle."""
    use(monkeypatch, Choice)
    said, learners = [], []

    def watch(owner, name):
        def watched(*args, real=getattr(owner, name), **options):
            learners.extend(x for x in args if isinstance(x, am.Learner))
            said.append(name + "*" * (bool(learners) and learners[0].begun is not None))
            return real(*args, **options)
        monkeypatch.setattr(owner, name, watched)
    for owner, name in ((am.Learner, "begin_update"), (am.ReplayBuffer, "sample"), (am, "evaluate"),
                        (am.Collector, "act"), (am.Collector, "receive"), (am, "save_run")):
        watch(owner, name)
    assert am.main("--env probe --env-steps 60 --parallel-envs 10 --batch 8 --replay-ratio 2"
                   " --episodes 1 --eval-every 20 --checkpoint-minutes 0 --out run".split()) == 0
    told = " ".join(said[said.index("begin_update"):])
    assert set(said) == {"begin_update", "sample", "sample*", "evaluate", "act", "receive",
                         "receive*", "save_run"}
    assert "begin_update sample* begin_update receive* save_run act" in told


def test_training_never_sees_the_rollouts_of_evaluation(tmp_path, monkeypatch):
    """Catches an evaluation on the training's environments, with any two seeds."""
    use(monkeypatch, Choice)
    seeds, make_env = {"training": set(), "evaluation": set()}, am.environments.make_env
    where = ["training"]

    def record(name, seed=None):
        seeds[where[-1]].add(seed)
        return make_env(name, seed)

    def evaluate(*args, real=am.evaluate, **options):
        where.append("evaluation")
        try:
            return real(*args, **options)
        finally:
            where.pop()
    monkeypatch.setattr(am.environments, "make_env", record)
    monkeypatch.setattr(am, "evaluate", evaluate)
    for seed in range(3):
        am.train(am.Config(env="probe", env_steps=1, seed=seed, out=f"run{seed}"))
    seeds["training"].discard(None)                       # the one that is only looked at
    assert len(seeds["training"]) == 3 * 16 and seeds["evaluation"]
    assert not seeds["training"] & seeds["evaluation"]


# ---- folders ----


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_never_overwritten(tmp_path, monkeypatch, capsys):
    """Catches a second run that writes into the folder of the first one."""
    use(monkeypatch, Choice)
    short = ["--env", "probe", "--env-steps", "2", *SMALL]
    assert am.main([*short, "--out", "a"]) == am.main(short) == am.main(short) == 0
    before = contents(tmp_path)
    assert {path.parent.name for path in before} == {"a", "probe-0", "probe-0-2"}
    capsys.readouterr()
    assert am.main([*short, "--out", "a"]) == 2
    assert "--out a" in one_line(capsys) and contents(tmp_path) == before
    (tmp_path / "a" / "log.csv").unlink()                    # what is left can still be resumed
    assert am.main([*short, "--out", "a"]) == 2 and "--out a" in one_line(capsys)


# ---- bad arguments ----


def one_line(capsys):
    """Standard error, which must be one line."""
    text = capsys.readouterr().err
    assert text.endswith("\n") and text.count("\n") == 1, text
    return text


BAD = [  # arguments; what the message has to contain: the wrong word and the nearest right one
    ("--env popgym:RepeatPrevios", "popgym:RepeatPrevios'", "popgym:RepeatPrevious,"),
    ("--env popgim:RepeatPrevious", "popgim", "popgym"),
    ("--env RepeatPrevious", "RepeatPrevious", "popgym:RepeatPreviousEasy"),
    ("--env gym:CartPol-v1", "gym:CartPol-v1'", "gym:CartPole-v1"),
    ("--env gym:CartPole-v1?horizn=3", "horizn'", "horizon"),
    ("--sizee nano", "--sizee", "--size"),
    ("--no-bootstrap", "--no-bootstrap", "--no-bootstrap-truncated"),
    ("--size smal", "'smal'", "small"),
    ("--positions rotry", "'rotry'", "rotary"),
    ("--device cudaa", "'cudaa'", "cpu"),
    ("--device cuda:77", "'cuda:77'", "cpu"),
    ("--device meta", "meta", "cpu"),
    ("--device mps", "mps", "cpu"),
    ("--device cpu:0", "'cpu:0'", "cpu"),
    ("--batch 0", "--batch 0", "1"),
    ("--batch x", "--batch", "'x'"),
    ("--batch 1.5", "--batch", "'1.5'"),
    ("--batch", "--batch", "one argument; such as --batch 24"),
    ("--size", "--size", "one argument; such as --size nano|small|paper"),
    ("-x", "-x", "nearest: --"),
    ("sed 3", "sed", "nearest: --seed"),
    ("--batch 999999999999", "--batch 999999999999", "100000"),
    ("--env-steps 1 --parallel-envs 100000000000", "--parallel-envs 100000000000", "10000"),
    ("--critics 999999999999", "--critics 999999999999", "1000"),
    ("--context 9999999999999999999999999", "--context 9999999999", "1000000000000"),
    ("--buffer-steps 1000000000000000", "--buffer-steps 10000000", "1000000000000"),
    ("--buffer-steps 900000000000", "memory", "--buffer-steps"),
    ("--grad-clip 0", "--grad-clip 0", "1e-09"),
    ("--env wind", "'wind'", "nearest: wind:"),
    ("--env crafter", "'crafter'", "crafter:instructions"),
    ("--env darkky", "'darkky'", "nearest: darkkey:"),
    ("--env gym:no_such_env:X-v0", "no_such_env", "no_such_env.py beside amago_min.py"),
    ("--out /proc/x", "--out /proc/x", "cannot be written"),
    ("--lr 2", "--lr 2.0", "1"),
    ("--lr -1", "--lr -1", "0"),
    ("--lr nan", "--lr nan", "0"),
    ("--lr x", "--lr", "'x'"),
    ("--weight-decay inf", "--weight-decay", "inf"),
    ("--replay-ratio inf", "--replay-ratio", "inf"),
    ("--critics 1", "--critics 1", "2"),
    ("--tau 1.5", "--tau 1.5", "1"),
    ("--gammas 0.5 1.5", "--gammas 1.5", ".99999"),
    ("--gammas 1", "--gammas 1", ".99999"),
    ("--gammas", "--gammas", "at least one"),
    ("--env-steps inf", "--env-steps", "inf"),
    ("--env-steps 0", "--env-steps 0", "1"),
    ("--seed -1", "--seed -1", "0"),
    ("--seed 1e30", "--seed", "1"),
    ("--seed 99999999999999999999", "--seed 9999", ""),
    ("--target-return high", "'high'", "auto"),
    ("--target-return nan", "nan", "auto"),
    ("--buffer-steps 100 --env gym:CartPole-v1", "--buffer-steps 100", "501"),
    ("--eval nowhere", "nowhere", "folder"),
    ("--resume nowhere", "nowhere", "folder"),
    ("--eval nowhere --lr 1", "--lr", ""),
    ("--render a.gif", "--render", "--eval"),
    ("--threads 5000", "--threads 5000", "1024"),
    ("--amp of", "'of'", "off"),
    ("popgym:RepeatPrevious", "popgym:RepeatPrevious", "write --env popgym:RepeatPrevious"),
    ("--out taken.txt", "taken.txt", ""),
    ("--out taken.txt/run", "taken.txt", ""),
]


@pytest.mark.parametrize("arguments, wrong, right", BAD, ids=[case[0] for case in BAD])
def test_bad_arguments(arguments, wrong, right, tmp_path, capsys):
    """Catches a traceback, a message that does not help, and files of a run that never was."""
    (tmp_path / "taken.txt").write_text("mine")
    before = contents(tmp_path)
    if not {"--env-steps", "--eval", "--resume"} & set(arguments.split()):
        arguments += " --env-steps 1 " + " ".join(SMALL[:4])     # should it start, it ends soon
    assert am.main(arguments.split()) == 2
    message = one_line(capsys)
    assert wrong in message and right in message.split(wrong, 1)[1]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("flag", ["--eval", "--resume", "--out", "--render", "--instruction",
                                  "--env", "--size", "--device"])
def test_an_empty_value_is_no_value(flag, capsys):
    """Catches `--eval "$RUN"` with a RUN that is not set: it would train for hours."""
    more = ["--eval", "run"] if flag in ("--render", "--instruction") else ["--env-steps", "1"]
    assert am.main([*more, flag, ""]) == 2
    assert f"{flag} is empty" in one_line(capsys) and os.listdir() == []


@pytest.mark.parametrize("flag", ["--eval", "--resume", "--out", "--env-steps", "--explore-steps"])
def test_endless_values(flag, capsys):
    """Catches a traceback for a name that no file system takes, and for a number that no float
    holds."""
    more = SMALL + (["--env-steps", "1"] if flag in ("--out", "--explore-steps") else [])
    assert am.main([flag, "9" * 400] + (more if flag not in ("--eval", "--resume") else [])) == 2
    assert "99999" in one_line(capsys) and os.listdir() == []


def test_a_module_that_cannot_be_imported(monkeypatch, tmp_path, capsys):
    """Catches a traceback for a mistake in the user's own file, and a package of the same name that
    a stranger may have put into the index."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "boom_env.py").write_text("x = = 3")
    (tmp_path / "poor_env.py").write_text("import no_such_thing")
    for module, wrong in (("boom_env", "SyntaxError"), ("poor_env", "no_such_thing")):
        assert am.main(["--env", f"gym:{module}:X-v0", "--env-steps", "1", *SMALL]) == 2
        message = one_line(capsys)
        assert module in message and wrong in message and "pip" not in message
    assert not (tmp_path / "runs").exists()


def test_values_are_no_flags(monkeypatch, capsys):
    """Catches `--eval batch`, a folder, that is taken for --batch."""
    assert am.main(["--eval", "batch"]) == 2
    assert "batch/checkpoint.pt is not there" in one_line(capsys)
    values, given = am.read_command_line(am.Config, "amago_min.py", [
        "--out", "lr", "--env=seed", "--no-importance", "--render", "no-hide-plan"])
    assert given == dict(out="lr", env="seed", importance=False, render="no-hide-plan")
    assert values == {**dataclasses.asdict(am.Config()), "lr": 0.0, **given}


def test_the_default_folder_has_a_name_that_can_be_typed(monkeypatch):
    """Catches runs/wind--0, and a name of more than the 255 bytes that file systems take."""
    use(monkeypatch, Choice)
    for env, name in (("wind:", "wind-0"), ("maze:7x7?instruction=" + "travel to (1, 1), " * 30,
                                            "maze-7x7-instruction-travel-to-1-1-travel-to-")):
        assert am.main(["--env", env, "--env-steps", "2", *SMALL]) == 0
        assert any(x.startswith(name) and x.endswith("-0") for x in os.listdir("runs"))


@pytest.mark.parametrize("problem", [
    MemoryError("Unable to allocate 9 TiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0.\nDefaultCPUAllocator: can't allo"
                 "cate memory: you tried to allocate 400 bytes."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")], ids=repr)
@pytest.mark.parametrize("where, code", [("Learner.__init__", 2), ("Learner.begin_update", 1)])
def test_too_little_memory(problem, where, code, monkeypatch, capsys):
    """Catches a traceback, files of a run that never was, and a run that is not saved."""
    def fail(*_):
        raise problem
    use(monkeypatch, Choice)
    owner, name = where.split(".")
    monkeypatch.setattr(getattr(am, owner), name, fail)
    assert am.main(["--env", "probe", "--env-steps", "99", "--out", "run", *SMALL]) == code
    message = one_line(capsys)
    assert "too little memory" in message and "--batch" in message
    assert os.path.exists("run/checkpoint.pt") == os.path.exists("run") == (code == 1)


PATIENCE = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Watch())
import amago_min
"""


@pytest.mark.parametrize("given, seen", [
    ({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")])
def test_threads_do_not_wait_in_a_loop_for_long(given, seen):
    """Catches a hundredth of the speed beside one busy process: torch reads it when it is loaded;
    and that a user who knows better is not heard."""
    clean = {name: x for name, x in os.environ.items()
             if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    path = dict(clean, PYTHONPATH=os.path.dirname(am.__file__), **given)
    found = subprocess.run([sys.executable, "-c", PATIENCE], env=path, capture_output=True,
                           text=True, check=True)
    assert found.stdout.split() == [seen]


SHAPES = """
import resource, sys, torch, amago_min
assert amago_min.main(sys.argv[1:]) == 0
weight, size = torch.ones(256, 256, dtype=torch.bfloat16), []
for rows in range(330):
    torch.ones(500 + rows, 256, dtype=torch.bfloat16) @ weight
    size.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(f"grew by {size[-1] - size[29]:.0f} MB")
"""


def test_products_of_shapes_that_do_not_come_again_are_forgotten():
    """Catches gigabytes of code, kept for batches that all have another number of steps."""
    command = [sys.executable, "-c", SHAPES, "--env-steps", "1", "--out", "run", *SMALL]
    path = dict(os.environ, PYTHONPATH=os.path.dirname(am.__file__))
    found = subprocess.run(command, env=path, capture_output=True, text=True, check=True)
    assert int(found.stdout.split("grew by ")[1].split()[0]) < 150, "228 MB if all are kept"


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_missing_package_comes_with_its_command(evaluating, monkeypatch, capsys, tmp_path):
    """Catches a bare ModuleNotFoundError, in training and on another machine in --eval."""
    command = []
    if evaluating:
        assert am.main(["--env-steps", "1", "--out", "run", *SMALL]) == 0
        command = ["--eval", "run"]
    before = contents(tmp_path)
    find = am.environments.importlib.util.find_spec
    monkeypatch.setattr(am.environments.importlib.util, "find_spec",
                        lambda name, *rest: None if name == "popgym" else find(name, *rest))
    capsys.readouterr()
    assert am.main(command) == 2
    assert "pip install popgym==" in one_line(capsys) and contents(tmp_path) == before


@pytest.mark.parametrize("missing", ["no-such-c++", "Python.h"])
def test_compiling_needs_a_compiler(missing, monkeypatch, capsys, tmp_path):
    """Catches a page of torch's own words in the first update, after the folder was written."""
    if missing == "Python.h":
        monkeypatch.setattr(am.environments.shutil, "which", lambda name: name)
        monkeypatch.setattr(am.environments.sysconfig, "get_path", lambda name: str(tmp_path))
    else:
        monkeypatch.setenv("CXX", missing)
    assert am.main(["--compile", "--out", "run"]) == 2
    message = one_line(capsys)
    assert "--compile" in message and missing in message and contents(tmp_path) == {}


def test_exit_code_of_the_program():
    """Catches an exit code that never leaves Python."""
    run = subprocess.run([sys.executable, PROGRAM, "--size", "smal"], capture_output=True,
                         text=True)
    assert (run.returncode, run.stdout) == (2, "") and "small" in run.stderr
    assert run.stderr.count("\n") == 1 and os.listdir() == []


def test_numbers_may_be_written_as_people_do():
    """Catches 1_000 or 1e3 that is no number, or no whole one."""
    config = am.parse_command_line("--env-steps 1_000 --lr 1e-3 --gammas 0 .9".split())[0]
    assert (config.env_steps, config.lr, config.gammas) == (1000, .001, (0, .9))
    config = am.parse_command_line("--env-steps 1e6 --batch 2.5e1 --seed 7.".split())[0]
    assert repr((config.env_steps, config.batch, config.seed)) == "(1000000, 25, 7)"


@pytest.mark.parametrize("text", "-1 -1. -1e3 -.5 1. +1 1e+3 .5 1E2 -2.5e-3".split())
def test_target_return_takes_any_number(text):
    """Catches a number that float() knows and the command line does not."""
    config = am.parse_command_line(["--target-return", text])[0]
    assert am.environments.stopping_return(config, Probe()) == float(text)
    config = am.Config(target_return=float(text))                        # as one writes in Python
    assert am.environments.stopping_return(config, Probe()) == float(text)


@pytest.mark.parametrize("options", [
    dict(batch=1.5), dict(batch="24"), dict(batch=True), dict(lr="x"), dict(gammas=[.9, "x"]),
    dict(env=3), dict(importance=1), dict(size=None), dict(gammas=[])], ids=str)
def test_config_checks_kinds(options):
    """Catches an option of the wrong kind, from Python or a checkpoint, that fails hours later."""
    with pytest.raises(am.UsageError, match=f"--{min(options)}"):
        am.Config(**options)


@pytest.fixture(scope="module")
def maze_agent(tmp_path_factory):
    """The folder of an agent for a maze with an instruction in its name."""
    folder = tmp_path_factory.mktemp("agent") / "run"
    assert am.main(["--env", "maze:7x7?goals=2&instruction=travel to (1, 1)", "--env-steps", "1",
                    "--out", str(folder), *SMALL]) == 0
    return str(folder)


def test_another_instruction(maze_agent, capsys):
    """Catches an agent that, once trained for one instruction, can be given no other."""
    assert am.main(["--eval", maze_agent, "--episodes", "1", "--instruction",
                    "travel to (1, 3),travel to (5, 5)"]) == 0
    printed = capsys.readouterr().out
    assert "maze:7x7?goals=2&instruction=travel to (1, 3), travel to (5, 5) after" in printed


@pytest.mark.parametrize("text", ["travel & rest", "a=b&c=d", "3", "true", "1e5", "?", "&"])
def test_a_wrong_instruction(text, maze_agent, capsys):
    """Catches an instruction that is read as options, or as a number instead of words."""
    assert am.main(["--eval", maze_agent, "--episodes", "1", "--instruction", text]) == 2
    message = one_line(capsys)
    assert f"unknown goal {text!r}" in message and "nearest: travel to" in message
    if "&" not in text:                                   # which would begin the next option
        with pytest.raises(am.UsageError, match="unknown goal"):
            am.environments.make_env(f"maze:7x7?instruction={text}")


def test_an_instruction_for_an_agent_that_takes_none(capsys):
    """Catches a message about keywords of a constructor."""
    assert am.main(["--env-steps", "1", "--out", "run", *SMALL]) == 0
    capsys.readouterr()
    assert am.main(["--eval", "run", "--instruction", "eat cow"]) == 2
    assert "popgym:RepeatPrevious has no instructions" in one_line(capsys)


@pytest.mark.parametrize("path", ["/proc/x.gif", "/proc/x.png", "folder.gif", "9" * 300 + ".gif"])
def test_a_picture_that_cannot_be_written(path, maze_agent, monkeypatch, capsys):
    """Catches an episode that is played for nothing, and a traceback."""
    os.mkdir("folder.gif")
    monkeypatch.setattr(am, "Collector", None)                           # nothing is played
    assert am.main(["--eval", maze_agent, "--render", path]) == 2
    assert "cannot be written" in one_line(capsys) and os.listdir() == ["folder.gif"]


# ---- what breaks on the way ----


class Broken(Probe):
    """Step 3 of every second rollout goes wrong."""
    horizon, rollouts = 5, 0
    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.rollouts += 1
        return super().reset(seed=seed)

    def look(self):
        good = np.zeros(3, np.float32)
        return self.wrong if self.now() and self.key == "vector" else good

    def pay(self, action):
        self.t += 1                       # the reward of step 3 comes with observation 3
        reward = self.wrong if self.now() and self.key == "reward" else 1
        self.t -= 1
        return reward

    def now(self):
        return self.t == self.at and self.rollouts % 2 == 0


WRONG = [("vector", x, at) for at in (0, 3, 5) for x in (
    np.array([0, math.nan, 0], np.float32), np.array([0, -1e38, 0], np.float32),
    np.zeros(2, np.float32), np.zeros(1, np.float32),
    np.zeros((), np.float32))] + [("reward", math.nan, 3), ("reward", math.inf, 3),
                                    ("reward", -1e38, 3)]


@pytest.mark.parametrize("n_envs", ["1", "3"])
@pytest.mark.parametrize("key, wrong, at", WRONG, ids=lambda x: str(getattr(x, "shape", x)))
def test_a_broken_environment_is_named(key, wrong, at, n_envs, monkeypatch, capsys, tmp_path):
    """Catches NaN, or a shape that numpy would stretch, on its way into the buffer; 0 is the
    first observation of a rollout and 5 the last one."""
    use(monkeypatch, Broken, key=key, wrong=wrong, at=at)
    assert am.main(["--env", "probe", "--parallel-envs", n_envs, "--episodes", n_envs,
                    "--env-steps", "30", "--out", "run"]) == 1
    message = one_line(capsys)
    assert "probe" in message and key in message and f"step {at}" in message
    assert finite(saved(tmp_path / "run"))


def until_broken(monkeypatch, tmp_path):
    """Train on `probe` until it breaks -> exit code, the saved state, states after each update"""
    states, end_update = [], am.Learner.end_update

    def record(self):
        info = end_update(self)
        if info:
            states.append({name: x.clone() for name, x in self.agent.state_dict().items()})
        return info
    monkeypatch.setattr(am.Learner, "end_update", record)
    code = am.main(["--env", "probe", "--env-steps", "2000", "--batch", "8", "--parallel-envs", "8",
                    "--episodes", "1", "--eval-every", "10000", "--out", "run"])
    return code, saved(tmp_path / "run"), states


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch, capsys, tmp_path):
    """Catches training on after NaN, and a checkpoint that the last batch has spoiled: its weights,
    or statistics alone (PopArt's, the encoder's, sigma's u and v)."""
    use(monkeypatch, Choice)
    loss, calls = am.Agent.loss, []

    def spoil(self, batch, *more):
        calls.append(batch)
        total, info = loss(self, batch)
        return total * (math.nan if len(calls) == 4 else 1), info
    monkeypatch.setattr(am.Agent, "loss", spoil)
    code, state, states = until_broken(monkeypatch, tmp_path)
    message = one_line(capsys)
    assert code == 1 and len(calls) == 4 and len(states) == state["learner"]["updates"] == 3
    assert all(word in message for word in ("loss is nan", "update 3", "reward", "vector"))
    log = state["log"]                                    # nothing of the failed update
    assert log["count"] == 3 and all(math.isfinite(x) for x in log["sums"].values())
    assert all(torch.equal(state["learner"]["agent"][name], x) for name, x in states[-1].items())


def test_an_environment_that_breaks_while_a_loss_is_not_finite(monkeypatch, capsys, tmp_path):
    """Catches a run of which nothing is saved, and whose environment's own words are lost."""
    use(monkeypatch, Choice)
    loss, check, calls = am.Agent.loss, am.environments.Shard.check, []
    last = 24                                             # update between two steps of Choice

    def spoil(self, batch, *more):
        calls.append(batch)
        total, info = loss(self, batch)
        return total * (math.nan if len(calls) == last else 1), info

    def fail(self, i, observation):
        if len(calls) == last:
            raise self.broken(i, "it broke")
        return check(self, i, observation)
    monkeypatch.setattr(am.Agent, "loss", spoil)
    monkeypatch.setattr(am.environments.Shard, "check", fail)
    code, state, states = until_broken(monkeypatch, tmp_path)
    assert code == 1 and "it broke" in one_line(capsys)
    assert len(states) == state["learner"]["updates"] == last - 1 and finite(state)
    assert all(torch.equal(state["learner"]["agent"][name], x) for name, x in states[-1].items())


class Explosive(Choice):
    """Pays 1e30, whose square no float32 can hold, from the 50th rollout on."""
    rollouts = 0

    def pay(self, action):
        Explosive.rollouts += 1
        return 1e30 if Explosive.rollouts > 50 else 1


def test_a_reward_too_large_to_square_is_named(monkeypatch, capsys, tmp_path):
    """Catches a reward that reaches the buffer and makes the statistics infinite; the agent that is
    saved is the one from before it."""
    monkeypatch.setattr(Explosive, "rollouts", 0)
    use(monkeypatch, Explosive)
    code, state, states = until_broken(monkeypatch, tmp_path)
    message = one_line(capsys)
    assert code == 1 and "the reward is 1e+30" in message
    assert len(states) == state["learner"]["updates"] > 0
    assert finite(state)
    assert all(torch.equal(state["learner"]["agent"][name], x) for name, x in states[-1].items())


def test_gradients_that_are_not_finite_stop_the_run(monkeypatch, capsys, tmp_path):
    """Catches a finite loss with a NaN gradient, which clipping spreads over all weights."""
    use(monkeypatch, Choice)
    loss, calls = am.Agent.loss, []

    def spoil(self, batch, *more):
        calls.append(batch)
        total, info = loss(self, batch)
        if len(calls) == 4:
            total.register_hook(lambda gradient: gradient * math.nan)
        return total, info
    monkeypatch.setattr(am.Agent, "loss", spoil)
    code, state, _ = until_broken(monkeypatch, tmp_path)
    assert code == 1 and "update 3" in one_line(capsys) and finite(state)


@pytest.mark.parametrize("given, horizon, steps, following", [
    (0, 51, 0, 1000), (0, 2000, 0, 32_000), (0, 2000, 500_000, 550_000), (20, 2000, 40, 60)])
def test_long_rollouts_are_evaluated_less_often(given, horizon, steps, following):
    """By hand: 64 episodes of 2000 steps are 128 000 steps, a quarter of them 32 000. Catches runs
    on Crafter that spend their first hour with evaluations."""
    class Long(Constant):
        references, max_return = {}, None
    env = Long()
    env.horizon = horizon
    log = am.Log(am.Config(eval_every=given), env, "agent", writes=False)
    log.row(dict(return_mean=0.0, return_std=0.0, success=math.nan), steps, updates=0)
    assert log.next_eval == following


@pytest.mark.parametrize("given, following", [(1000, 1500), (2000, 1500), (300, 800)])
def test_a_resumed_run_may_be_evaluated_more_often(given, following):
    """Catches an --eval-every that a resumed run takes but does not follow. The last row is of 500
    env steps, the end of the run before it; the next evaluation was due at 1500."""
    env = Constant()
    log = am.Log(am.Config(eval_every=1500), env, "agent", writes=False)
    for steps in (0, 500):
        log.row(dict(return_mean=0.0, return_std=0.0, success=math.nan), steps, updates=0)
    resumed = am.Log(am.Config(eval_every=given), env, "agent", writes=False)
    resumed.restore(log.state())
    assert resumed.next_eval == following


def test_control_c_saves_and_exits_130(tmp_path):
    """Catches Ctrl-C that kills the run in the middle of an update or of a file."""
    command = [sys.executable, PROGRAM, "--env", "gym:CartPole-v1?horizon=20",
               "--eval-every", "20", "--out", "run", *SMALL]
    with open("stderr", "w") as stderr:
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    log = tmp_path / "run" / "log.csv"
    while run.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.05)                                  # a header and two evaluations
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130, (tmp_path / "stderr").read_text()
    header, *rows = rows_of(tmp_path / "run")
    assert len(rows) >= 2 and all(len(row) == len(header) for row in rows)
    assert finite(saved(tmp_path / "run")) and (tmp_path / "run" / "eval.json").exists()
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_control_c_does_not_wait_for_an_evaluation(monkeypatch, tmp_path):
    """Catches an evaluation that is played to its end, which may take long, after Ctrl-C, and a row
    made of the part that was played; resumed, the run evaluates first and goes on as if nothing
    had been."""
    use(monkeypatch, Choice, horizon=6)
    options = ["--env", "probe", "--env-steps", "120", "--eval-every", "40", *SMALL]
    assert am.main([*options, "--out", "whole"]) == 0
    evaluate, step, calls = am.evaluate, am.Collector.step, []

    def interrupted(self):
        calls[-1] += 1
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self)
    monkeypatch.setattr(am, "evaluate", lambda *a, **k: calls.append(0) or evaluate(*a, **k))
    monkeypatch.setattr(am.Collector, "step", interrupted)
    assert am.main([*options, "--out", "run"]) == 130
    assert len(rows_of(tmp_path / "run")) == 2 and calls[1] == 1          # a header, one row
    assert am.main(["--resume", "run"]) == 0
    assert [row[3:6] for row in rows_of(tmp_path / "run")] == [
        row[3:6] for row in rows_of(tmp_path / "whole")]


def test_control_c_waits_for_the_end_of_the_update(monkeypatch, tmp_path):
    """Catches an interrupt between the optimiser's step and the targets': weights saved by a run
    that was interrupted in its third update are those after it."""
    use(monkeypatch, Choice)
    end_update, states = am.Learner.end_update, {}

    def interrupted(self):
        if self.updates == 2 and self.begun is not None:
            signal.raise_signal(signal.SIGINT)
        info = end_update(self)
        states[self.updates] = {name: x.clone() for name, x in self.agent.state_dict().items()}
        return info
    monkeypatch.setattr(am.Learner, "end_update", interrupted)
    assert am.main(["--env", "probe", "--env-steps", "2000", "--out", "run", *SMALL]) == 130
    state = saved(tmp_path / "run")
    updates = state["learner"]["updates"]
    assert updates == max(states) >= 3
    assert all(torch.equal(state["learner"]["agent"][name], x)
               for name, x in states[updates].items())


# ---- the console ----


def test_a_reader_that_goes_away(tmp_path):
    """Catches a training that ends because `| head -1` has seen enough, and one whose last lines
    are lost in a traceback: it goes on to its end, with everything saved."""
    command = [sys.executable, PROGRAM, "--env", "gym:CartPole-v1?horizon=20", "--env-steps", "200",
               "--eval-every", "40", "--out", "run", *SMALL]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert b"CartPole" in run.stdout.readline()
    run.stdout.close()
    error = run.stderr.read()
    assert (run.wait(60), error) == (0, b"")
    assert rows_of(tmp_path / "run")[-1][0] == "200" and saved(tmp_path / "run")["env_steps"] == 200


def test_a_line_where_there_is_no_console():
    """Catches a crash in a notebook that silences a run with redirect_stdout(None)."""
    with contextlib.redirect_stdout(None):
        am.say("nobody hears this")


@pytest.mark.parametrize("x, width, how, text", [
    (0.12345, 8, ".3f", "   0.123"), (-938.078, 8, ".3f", "  -938.1"),
    (-12345.6, 7, ".3f", " -12346"), (123456789.0, 8, ".3f", " 1.2e+08"),
    (1234567.0, 11, ",.0f", "  1,234,567"), (-1e-9, 7, ".2f", "  -0.00"),
    (float("nan"), 7, ".2f", "      -"), (float("-inf"), 7, ".2f", "   -inf")])
def test_a_long_number_does_not_touch_its_neighbour(x, width, how, text):
    """Catches `-882.225530.568`, return and deviation of a task with large rewards."""
    assert am.environments.in_column(x, width, how) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("seconds, shown", [(0.01, False), (1, True)])
def test_a_long_evaluation_shows_how_far_it_is(seconds, shown, monkeypatch):
    """Catches 20 s of silence before the first row, and a bar that flickers in each short one."""
    use(monkeypatch, Choice, horizon=6)
    agent = am.Agent(am.Spec.of(Choice()), am.Config()).eval()
    agent.spec = dataclasses.replace(agent.spec, horizon=6)
    screen, receive, clock = Terminal(), am.Collector.receive, [0.0]

    def slow(self):
        clock[0] += seconds
        return receive(self)
    monkeypatch.setattr(am.Collector, "receive", slow)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    am.evaluate(agent, "probe", 4)
    assert ("/6 [" in screen.getvalue()) == shown
    assert not shown or screen.getvalue().endswith("\r")  # and leaves nothing behind
