"""A run loses nothing: resumed exactly, whatever killed it, with any number of processes.

Most of it runs in forks of the test process, which have torch loaded already. KILLS=30 kills 30
times instead of 5.
"""

import contextlib
import csv
import errno
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import weakref
import zipfile

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import amago_min as am
from probes import Choice, Probe, use

PROGRAM, MAKE_ENV = pathlib.Path(am.__file__), am.environments.make_env
POLE, MAZE = "gym:CartPole-v1?horizon=15", "maze:5x5"
SAVE_ALWAYS = ["--checkpoint-minutes", "0"]


@pytest.fixture(autouse=True)
def small_and_alone(tmp_path, monkeypatch):
    """In an empty folder, with a tiny agent and a quick curve.png."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(am.SIZES, "nano", dict(width=16, layers=2, heads=2, ff=32, hidden=16,
                                               lr=1e-3))
    monkeypatch.setattr(am.environments, "plot_curve",
                        lambda rows, env, path: path.write_text(f"{len(rows)} rows"))


def train(env, steps, *more):
    """Evaluations at 0, 60, ... 300; rollouts longer than the context, a buffer that overflows.
    -> arguments of a run"""
    return ["--env", env, "--env-steps", str(steps), "--parallel-envs", "3", "--episodes", "2",
            "--batch", "4", "--context", "8", "--buffer-steps", "110", "--replay-ratio", "4",
            "--eval-every", "60", "--target-return", "none", "--threads", "1", *more]


def resume(folder, steps, *more):
    return ["--resume", folder, "--env-steps", str(steps), *more]


def saved(folder):
    return torch.load(pathlib.Path(folder) / "checkpoint.pt", weights_only=True)


TIMES = ("seconds", "acts_per_s", "updates_per_s", "acting", "learning")


def numbers(folder):
    """log.csv as it stands there, without the columns that a clock measured."""
    with open(pathlib.Path(folder) / "log.csv", newline="") as file:
        return [[x for name, x in row.items() if name not in TIMES] for row in csv.DictReader(file)]


def essence(state):
    """A checkpoint without the clock and without the options, some of which may change."""
    rows = [{name: x for name, x in row.items() if name not in TIMES} for row in
            state["log"]["rows"]]
    return dict(state, config=None, log=dict(state["log"], rows=rows, clock=None))


def different(a, b, path="state"):
    """The places where two nested states differ by a bit (a NaN is like any other)."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{path}: {list(a)} and {list(b)}"]
        return sum((different(a[name], b[name], f"{path}.{name}") for name in a), [])
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        return sum((different(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b))), [])
    if torch.is_tensor(a):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == \
            b.numpy().tobytes()
    else:
        same = a == b or a != a and b != b
    return [] if same else [path]


STRAIGHT = {}    # environment -> what 6 evaluations without an interruption leave


def assert_like_straight(folder, env=POLE):
    """The run in `folder` is, bit for bit, one of 300 steps that was never interrupted."""
    if env not in STRAIGHT:
        assert am.main(train(env, 300, "--out", "straight")) == 0
        STRAIGHT[env] = numbers("straight"), essence(saved("straight"))
    rows, state = STRAIGHT[env]
    assert [row[0] for row in rows] == ["0", "60", "120", "180", "240", "300"]
    assert numbers(folder) == rows
    assert different(essence(saved(folder)), state) == []
    assert not list(pathlib.Path(folder).glob("*.tmp"))


def one_line(text):
    assert text.endswith("\n") and text.count("\n") == 1, text
    return text


def contents(folder):
    return {path: path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()}


# ---- processes ----


def fork(call, name="fork"):
    """Run call() in a fork, its output in name.out and name.err -> process id. The exit code is
    what call gives."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        for descriptor, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{end}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
        code = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(pid, seconds=60):
    """The exit code of a fork, -9 for one that was killed; it must not take longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail(f"still running after {seconds} s")


def alive(pid):
    """Whether the process is there and has not ended, on Linux."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def fork_main(argv, before=lambda: None, name="fork"):
    """am.main(argv) in a fork, after before()."""
    return fork(lambda: (before(), am.main(argv))[1], name)


def call_at(owner, name, number, action):
    """Replace the function owner.name by one whose call number `number` calls action(*arguments)
    instead."""
    real, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(name)
        return (action if len(calls) == number else real)(*arguments, **options)
    setattr(owner, name, counted)


def kill_me(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


# ---- exactly the same run (T20) ----


ENVS = [POLE, "gym:Pendulum-v1?horizon=15", "meta:popgym:MineSweeper?episodes=2", MAZE]


@pytest.mark.parametrize("env", ENVS)
def test_three_and_three_evaluations_are_six(env):
    """Catches anything that a checkpoint does not hold or does not give back: a weight, a moment of
    the optimiser, a statistic, a rollout, a half-played episode, a random state, a counter. The
    actions are discrete, continuous, several in one; the observation of a maze is a dict, and its
    rollouts are relabelled, rare goals first."""
    assert am.main(train(env, 120, "--out", "run")) == 0
    middle = saved("run")
    assert middle["learner"]["updates"] and middle["learner"]["optimizer"]["state"]
    assert am.main(resume("run", 300)) == 0
    assert_like_straight("run", env)


def test_any_number_of_workers_gives_the_same_run():
    """Catches worker processes whose results come in another order, and a half-played episode that
    they do not begin again."""
    assert am.main(train(POLE, 120, "--out", "run", "--workers", "2")) == 0
    assert am.main(resume("run", 300, "--workers", "5")) == 0
    assert_like_straight("run")


def interrupt(*numbers):
    """In the eighth update come these lists of signals, one list a second after the other."""
    begin_update = am.Learner.begin_update

    def interrupted(self, batch):
        if self.updates == 7:
            for i, number in enumerate(numbers):
                time.sleep(1.1 * (i > 0))
                for each in number:
                    signal.raise_signal(each)
        return begin_update(self, batch)
    am.Learner.begin_update = interrupted


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM, signal.SIGINT)],
                         ids=["SIGINT", "SIGTERM and SIGINT"])
def test_an_interrupted_run_is_the_same_run(numbers):
    """Catches a signal that kills or that comes between an update and its targets, steps that are
    lost or played twice, and torchrun, which sends one more signal at once."""
    pid = fork_main(train(POLE, 300, "--out", "run"), lambda: interrupt(numbers))
    assert exit_code(pid) == 130
    assert "--resume" in one_line(pathlib.Path("fork.err").read_text())
    assert 7 < saved("run")["learner"]["updates"] < 15
    assert am.main(resume("run", 300)) == 0
    assert_like_straight("run")


def test_a_second_interrupt_saves_nothing_half_done():
    """Catches a second Ctrl-C that is not obeyed, or that replaces a good checkpoint by what an
    update had come to."""
    pid = fork_main(train(POLE, 300, "--out", "run", *SAVE_ALWAYS),
                    lambda: interrupt([signal.SIGINT], [signal.SIGINT]))
    assert exit_code(pid) == 130
    assert "saved" not in one_line(pathlib.Path("fork.err").read_text())
    state = saved("run")
    assert state["learner"]["updates"] <= 7 and "envs" in state["processes"][0]["collector"]
    assert am.main(resume("run", 300, "--checkpoint-minutes", "10")) == 0
    assert_like_straight("run")


# ---- kill -9 ----


def test_a_run_that_is_killed_before_its_first_ten_minutes():
    """Catches a folder that can neither be resumed nor started again."""
    def killed():
        call_at(am.Collector, "act", 40, kill_me)
    assert exit_code(fork_main(train(POLE, 300, "--out", "run"), killed)) == -signal.SIGKILL
    assert am.main(resume("run", 300)) == 0
    assert_like_straight("run")


def wait_for_checkpoints(pid, number):
    """Until process pid has written so many, or has ended."""
    path, seen = pathlib.Path("run/checkpoint.pt"), set()
    if path.exists():
        number += 1                                       # it is there already
    while len(seen) < number and alive(pid):
        with contextlib.suppress(FileNotFoundError):
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.001)


def test_kill_at_any_moment():
    """Catches a checkpoint that is missing, torn or older than one that was there, at whatever
    moment the process dies: while it starts, steps, learns, evaluates or writes."""
    kills, torn, early, steps = 0, 0, 0, 0
    path = pathlib.Path("run/checkpoint.pt")
    while kills < int(os.environ.get("KILLS", 5)) or steps == 0:
        pid = fork_main(resume("run", 300) if path.exists() else
                        train(POLE, 300, "--out", "run", *SAVE_ALWAYS))
        wait_for_checkpoints(pid, random.randrange(6))
        time.sleep(random.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        code = exit_code(pid)
        assert code in (0, -signal.SIGKILL), pathlib.Path("fork.err").read_text()
        kills += code != 0
        torn += pathlib.Path(f"{path}.tmp").exists()
        before, steps = steps, am.load_checkpoint("run")[-1]["env_steps"] if path.exists() else 0
        assert steps >= before
        if code == 0:                                     # too late: once more, from the start
            assert_like_straight("run")
        early += not path.exists()
        if code == 0 or not path.exists():
            shutil.rmtree("run", ignore_errors=True)
            steps = 0
    print(f"{kills} kills, {torn} of them while a checkpoint was written, {early} before the first")
    assert am.main(resume("run", 300)) == 0
    assert_like_straight("run")


def half_a_file(state, file):
    file.write(b"x" * 1000)
    file.flush()
    kill_me()


@pytest.mark.parametrize("owner, name, action", [
    (torch, "save", half_a_file), (os, "fsync", kill_me), (os, "replace", kill_me)],
    ids=["save", "fsync", "replace"])
def test_kill_in_the_middle_of_a_write(owner, name, action):
    """Catches a checkpoint that is written over the previous one."""
    argv = train(POLE, 300, "--out", "run", *SAVE_ALWAYS)
    assert exit_code(fork_main(argv, lambda: call_at(owner, name, 50, action))) == -9
    assert {path.name for path in pathlib.Path("run").glob("checkpoint*")} == {
        "checkpoint.pt", "checkpoint.pt.tmp"}
    assert am.load_checkpoint("run")[-1]["env_steps"] == 3 * 48        # the first was at step 0
    assert am.main(resume("run", 300, "--checkpoint-minutes", "10")) == 0
    assert_like_straight("run")


def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_previous_one(monkeypatch, tmp_path):
    """Catches a rename that outruns the data: after a power cut the file would be empty."""
    calls = []
    for owner, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        monkeypatch.setattr(owner, name, lambda *arguments, real=getattr(owner, name), name=name: (
            real(*arguments), calls.append(name)))
    am.save_checkpoint(tmp_path / "checkpoint.pt", dict(x=np.zeros(3)))
    assert calls == ["save", "fsync", "replace"]
    assert saved(tmp_path)["x"].tolist() == [0, 0, 0]


# ---- damaged and foreign checkpoints ----


def refused(folder, original):
    """load_checkpoint's message, one line; None if it loads exactly the original state."""
    try:
        state = am.load_checkpoint(folder)[-1]
    except am.UsageError as problem:
        return one_line(f"{problem}\n")
    assert different(state, original) == []


def test_damaged_checkpoints():
    """Catches a wrong byte that becomes a wrong number, and a traceback: whatever is done to the
    file, it is refused in one line or loads exactly what was saved."""
    rng = random.Random(0)
    assert am.main(train(POLE, 120, "--out", "original")) == 0
    good, original = pathlib.Path("original/checkpoint.pt").read_bytes(), saved("original")
    # Where a file says what is where: the heads of the archive's parts, and its directory, which
    # may call a part a folder (byte 38), and torch would read nothing into its tensor.
    with zipfile.ZipFile("original/checkpoint.pt") as archive:
        heads = [part.header_offset for part in archive.infolist()]
        directory = archive.start_dir
    places = ([rng.randrange(len(good)) for _ in range(60)]
              + [rng.choice(heads) + rng.randrange(64) for _ in range(20)]
              + [rng.randrange(directory, len(good)) for _ in range(40)])
    changes = [(i, rng.randrange(1, 256)) for i in places]
    entry = good.index(b"PK\1\2", (directory + len(good)) // 2)
    changes.append((entry + 38, 0x10))
    damaged = [good[:i] + bytes([good[i] ^ change]) + good[i + 1:] for i, change in changes]
    damaged += [good[:rng.randrange(len(good))] for _ in range(20)] + [good[:-1], good[:4], b""]
    os.mkdir("copy")
    messages = []
    for content in damaged:
        pathlib.Path("copy/checkpoint.pt").write_bytes(content)
        messages.append(refused("copy", original))
    assert all("copy/checkpoint.pt is damaged" in text for text in messages if text)
    assert all(messages[-23:]) and sum(map(bool, messages[:60])) > 50    # data, nearly all of it
    assert messages[120] and refused("original", original) is None


class Foreign:
    """Writes a file where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


FOREIGN = {"text": "a text\n", "a list": [torch.zeros(3)], "a number": 3, "code": Foreign(),
           "no version": dict(model=3), "another version": dict(version=1)}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("flag", ["--resume", "--eval"])
def test_foreign_checkpoints(content, flag, capsys):
    """Catches a traceback, a message that does not name the file, and code that a file runs."""
    os.mkdir("run")
    path = pathlib.Path("run/checkpoint.pt")
    path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    before = contents(".")
    assert am.main([flag, "run"]) == 2
    message = one_line(capsys.readouterr().err)
    assert "run/checkpoint.pt" in message and contents(".") == before
    assert "version" in message or content is not FOREIGN["another version"]
    assert not pathlib.Path("unpickled").exists()


def without(*names):
    return lambda state: [state.pop(name) for name in names]


WRONG_PARTS = {  # what is done to a good checkpoint
    "only a version": without("config", "spec", "learner", "env_steps", "log", "processes"),
    "a tensor for a version": lambda x: x.update(version=torch.tensor(3)),
    "two versions": lambda x: x.update(version=torch.tensor([3, 3])),
    "a version as text": lambda x: x.update(version="3"),
    "a list of options": lambda x: x.update(config=[1, 2]),
    "another option": lambda x: x["config"].update(depth=3),
    "an option of another kind": lambda x: x["config"].update(gammas=.9),
    "an option that may not be": lambda x: x["config"].update(batch=-1),
    "no spec": without("spec"),
    "another field": lambda x: x["spec"].update(depth=3),
    "no steps": without("env_steps"),
    "steps as text": lambda x: x.update(env_steps="120"),
    "no processes": without("processes"),
    "a number of processes": lambda x: x.update(processes=1),
    "no weights": lambda x: x["learner"].pop("average"),
    "a list of weights": lambda x: x["learner"].update(average=[1, 2]),
    "a weight too few": lambda x: x["learner"]["average"].pop("transformer.norm.weight"),
    "a weight of another size": lambda x: x["learner"]["average"].update(
        {"transformer.norm.weight": torch.zeros(3)}),
    "a weight that is none": lambda x: x["learner"]["average"].update(
        {"transformer.norm.weight": "text"}),
    "another size of agent": lambda x: x["config"].update(size="small"),
}
ONLY_RESUME = {  # what --eval has no need of
    "no log": without("log"),
    "a list of a log": lambda x: x.update(log=[1]),
    "no optimiser": lambda x: x["learner"].pop("optimizer"),
    "an empty process": lambda x: x.update(processes={0: {}}),
    "another process": lambda x: x.update(processes={1: x["processes"][0]}),
    "no rollouts": lambda x: x["processes"][0].pop("buffer"),
    "a buffer of another size": lambda x: x["processes"][0]["buffer"].update(
        tokens=am.each(lambda y: torch.zeros(7, 7), x["processes"][0]["buffer"]["tokens"])),
    "random numbers of nobody": lambda x: x["processes"][0].update(rng="{}"),
}


def test_wrong_parts_of_a_checkpoint(capsys):
    """Catches a traceback for a file that torch reads, with our version in it, but in which
    something else lies: another program's, or that of a run which was edited by hand."""
    assert am.main(train(POLE, 60, "--out", "run")) == 0
    good = pathlib.Path("run/checkpoint.pt").read_bytes()
    for name, spoil in {**WRONG_PARTS, **ONLY_RESUME}.items():
        pathlib.Path("run/checkpoint.pt").write_bytes(good)
        state = saved("run")
        spoil(state)
        torch.save(state, "run/checkpoint.pt")
        before = contents(".")
        for flag in ("--resume",) if name in ONLY_RESUME else ("--resume", "--eval"):
            capsys.readouterr()
            assert am.main([flag, "run"]) == 2, name
            message = one_line(capsys.readouterr().err)
            assert "run/checkpoint.pt is damaged, or no checkpoint" in message, name
            assert contents(".") == before, name


def test_a_checkpoint_that_does_not_fit(monkeypatch, capsys):
    """Catches a run that goes on with other spaces, without its environment or with another number
    of processes, and one that is not resumed on a machine without the device that it names."""
    use(monkeypatch, Choice)
    assert am.main(train("probe", 20, "--out", "run")) == 0
    before = contents("run")

    def complaint(*argv):
        capsys.readouterr()
        assert am.main(list(argv)) == 2 and contents("run") == before
        return one_line(capsys.readouterr().err)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "by 1 processes" in complaint("--resume", "run")
    monkeypatch.delenv("WORLD_SIZE")
    for changed in (dict(observation_space=Box(-1, 1, (2,), np.float32)), dict(horizon=2),
                    dict(action_space=gymnasium.spaces.Discrete(3))):
        use(monkeypatch, Choice, **changed)
        for flag in ("--resume", "--eval"):
            assert "other spaces" in complaint(flag, "run")

    monkeypatch.setattr(am.environments, "make_env", MAKE_ENV)           # which knows no probes
    for flag in ("--resume", "--eval"):
        assert "environment 'probe'" in complaint(flag, "run")

    use(monkeypatch, Choice)
    state = saved("run")
    state["config"]["device"] = "cuda:77"
    am.save_checkpoint("run/checkpoint.pt", state)
    before = contents("run")
    assert "cuda:77" in complaint("--resume", "run")
    assert am.main(["--eval", "run", "--device", "cpu"]) == 0
    assert am.main(resume("run", 30, "--device", "cpu")) == 0


def walk(x, path=""):
    """Every (path, part) of nested containers."""
    yield path, x
    if isinstance(x, (dict, list, tuple)):
        for name, part in x.items() if isinstance(x, dict) else enumerate(x):
            yield path, name
            yield from walk(part, f"{path}.{name}")


def test_a_checkpoint_is_plain_data():
    """Catches an object in a checkpoint, which only code could bring back."""
    assert am.main(train(MAZE, 120, "--out", "run")) == 0
    plain = (torch.Tensor, int, float, bool, str, type(None), list, tuple, dict)
    parts = list(walk(saved("run")))
    assert len(parts) > 300
    for path, x in parts:
        assert isinstance(x, plain), f"{path} is a {type(x)}"
    with zipfile.ZipFile("run/checkpoint.pt") as archive:
        pickled = archive.read(next(x for x in archive.namelist() if x.endswith("data.pkl")))
    named = {(module, name) for module, name in globals_of(pickled)}
    assert {module for module, _ in named} <= {"torch._utils", "torch", "collections"}, named


def globals_of(pickled):
    """(module, name) of everything that unpickling would import."""
    import pickletools
    for opcode, argument, _ in pickletools.genops(pickled):
        assert opcode.name != "STACK_GLOBAL"
        if opcode.name == "GLOBAL":
            yield tuple(argument.split(" "))


# ---- what may change ----


def test_what_may_change_on_resume(monkeypatch, capsys):
    """Catches a run whose second half was trained with other options, and a complaint that leaves
    the user alone with it or comes after something was written."""
    use(monkeypatch, Choice)
    assert am.main(train("probe", 30, "--out", "run")) == 0
    before = contents(".")
    for option in ("--tau 0.5", "--env gym:CartPole-v1", "--gammas 0.5 0.9", "--seed 3",
                   "--bootstrap-truncated", "--out elsewhere", "--batch=5"):
        capsys.readouterr()
        assert am.main(["--resume", "run", *option.split()]) == 2
        message = one_line(capsys.readouterr().err)
        flag = option.split()[0].split("=")[0]
        assert f"{flag} may not change" in message and "--env-steps" in message
        assert "--tau" not in message.split("these may")[1]
    for option in ("--eval run", "--render x.gif", "--instruction eat"):
        assert am.main(["--resume", "run", *option.split()]) == 2
        assert "--eval FOLDER" in one_line(capsys.readouterr().err)
    assert contents(".") == before
    assert am.main(["--resume", "run", "--env-steps", "60", "--seed", "0", "--batch", "4",
                    "--workers", "0", "--episodes", "3", "--device", "cpu"]) == 0
    state = saved("run")
    assert state["env_steps"] == 60 and state["config"]["episodes"] == 3
    assert state["config"]["batch"] == 4                  # not given a second time, not forgotten


def test_what_stays_the_same_may_be_said_again(monkeypatch, capsys):
    """Catches a complaint about an option that has the run's own value, written as people do."""
    use(monkeypatch, Choice)
    assert am.main(train("probe", 30, "--out", "run", "--gammas", "0.5", "0.9")) == 0
    same = "--lr 0 --gammas .5 .90 --size nano --weight-decay 1e-3 --no-hide-plan --batch 4e0"
    assert am.main(["--resume", "run", "--env-steps", "33", *same.split()]) == 0
    assert saved("run")["env_steps"] == 33
    assert am.main(["--resume", "run", "--env-steps", "33", "--tau", "1e-2"]) == 0
    assert am.main(["--resume", "run", "--env-steps", "33", "--tau", "2e-2"]) == 2


def test_a_learning_rate_may_fall_on_resume(monkeypatch):
    """Catches a rate that is refused, or written down and not learned with. At 1e-9 nothing moves
    by more than rounding."""
    use(monkeypatch, Choice)
    assert am.main(train("probe", 60, "--out", "run")) == 0
    old, updates = saved("run")["learner"]["agent"], saved("run")["learner"]["updates"]
    assert am.main(["--resume", "run", "--env-steps", "120", "--lr", "1e-9"]) == 0
    state = saved("run")
    assert state["config"]["lr"] == 1e-9 and state["learner"]["updates"] > updates
    for name in ("actor.mlp.0.weight", "encoder.mlp.0.weight", "transformer.norm.weight"):
        torch.testing.assert_close(state["learner"]["agent"][name], old[name], atol=1e-6, rtol=0)
    assert am.main(["--resume", "run", "--env-steps", "180", "--lr", "0"]) == 0
    assert saved("run")["config"]["lr"] == 1e-3          # the one of the size
    assert not torch.allclose(saved("run")["learner"]["agent"]["actor.mlp.0.weight"],
                              old["actor.mlp.0.weight"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("goal", ["none", "0.5"])
def test_a_finished_run_stays_as_it_is(goal, monkeypatch):
    """Catches a row, a step or an update too many, after a run that ended at its last step and
    after one that reached its goal."""
    use(monkeypatch, Choice)
    monkeypatch.setattr(am, "evaluate", lambda agent, *_, real=am.evaluate, **__: dict(
        real(agent, *_), return_mean=float(agent.popart.count > 0)))
    assert am.main(train("probe", 90, "--target-return", goal, "--out", "run")) == 0
    before, state = contents("run"), saved("run")
    assert (state["env_steps"] < 90) == (goal != "none")
    assert am.main(["--resume", "run"]) == 0
    after = contents("run")
    for name in ("log.csv", "eval.json", "curve.png"):
        path = pathlib.Path("run") / name
        assert after[path] == before[path], name
    assert different(essence(saved("run")), essence(state)) == []


# ---- a full disk ----


def test_a_full_disk_costs_one_checkpoint(monkeypatch, capfd):
    """Catches a run that ends because a checkpoint cannot be written, says nothing, or leaves half
    a file: it goes on, the previous checkpoint intact, and writes again when there is room."""
    save, intact = torch.save, []

    def full(state, file):
        if 100 <= state["env_steps"] <= 106:
            file.write(b"x" * 10_000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if state["env_steps"] == 108:
            intact.append((saved("run")["env_steps"], os.listdir("run")))
        save(state, file)
    monkeypatch.setattr(torch, "save", full)
    assert am.main(train(POLE, 300, "--out", "run", *SAVE_ALWAYS)) == 0
    printed = [line for line in capfd.readouterr().out.splitlines() if "space left" in line]
    assert len(printed) == 2 and all("not written: run/checkpoint.pt" in x for x in printed)
    (steps, files), = intact
    assert steps == 99 and set(files) == {"config.json", "log.csv", "checkpoint.pt",
                                          "checkpoint.pt.tmp"}
    assert_like_straight("run")


def test_a_disk_that_stays_full():
    """Catches a run that seems to have ended well although nothing of its second half was saved: it
    trains to the end, says so in one line, and leaves the checkpoint of the first half."""
    assert am.main(train(POLE, 120, "--out", "run", *SAVE_ALWAYS)) == 0
    before = pathlib.Path("run/checkpoint.pt").read_bytes()

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
    assert exit_code(fork_main(resume("run", 300), fill)) == 1
    assert "run/checkpoint.pt" in one_line(pathlib.Path("fork.err").read_text())
    printed = pathlib.Path("fork.out").read_text().splitlines()
    assert sum("not written: run/checkpoint.pt" in line for line in printed) >= 50
    assert len(numbers("run")) == 6 and not list(pathlib.Path("run").glob("*.tmp"))
    assert json.loads(pathlib.Path("run/eval.json").read_text())["env_steps"] == 300
    assert pathlib.Path("run/checkpoint.pt").read_bytes() == before
    assert am.main(resume("run", 300, "--checkpoint-minutes", "10")) == 0
    assert_like_straight("run")


def test_an_environment_that_does_not_follow_its_seed_is_named():
    """Catches a good checkpoint that is called damaged, because the episode that it was in the
    middle of now ends earlier."""
    shard = am.environments.Shard("popgym:RepeatFirstEasy", [0])
    shard.begin_all()
    for _ in range(10):
        shard.step([0])
    state, step = shard.state(), shard.envs[0].step
    shard.envs[0].step = lambda action: step(action)[:2] + (shard.time[0] > 5, False, {})
    with pytest.raises(am.BrokenEnvironment, match="at step 7.* follow its seed"):
        shard.restore(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_rollouts_that_cannot_come_back_give_way_to_others(workers, monkeypatch, capfd):
    """Catches a run that can never go on, as one environment does not follow its seed, and workers
    of which one is a step behind after that."""
    forked_workers(monkeypatch)
    assert am.main(train(POLE, 120, "--out", "run")) == 0
    shard = am.environments.Shard

    def elsewhere(self, i, episode, actions):
        raise am.environments.Unrepeatable("number 1 went another way")
    monkeypatch.setattr(shard, "play_again", elsewhere)
    capfd.readouterr()
    assert am.main(resume("run", 300, "--workers", str(workers))) == 0
    assert "rollouts under way are lost: number 1 went another way" in capfd.readouterr().out
    assert len(numbers("run")) == 6 and saved("run")["env_steps"] == 300


def test_an_environment_that_fails_on_resume_is_not_the_files_fault(monkeypatch, capfd):
    """Catches a good checkpoint that is called damaged, because a server is down for a moment."""
    assert am.main(train(POLE, 120, "--out", "run")) == 0
    before = {path: path.read_bytes() for path in pathlib.Path("run").iterdir()}

    def down(*_):
        raise ConnectionError("no route")
    with monkeypatch.context() as patch:
        patch.setattr(am.environments.gymnasium.Wrapper, "step", down)
        assert am.main(resume("run", 300)) == 1
    message = one_line(capfd.readouterr().err)
    assert "ConnectionError: no route" in message and "damaged" not in message
    assert {path: path.read_bytes() for path in pathlib.Path("run").iterdir()} == before
    assert am.main(resume("run", 300)) == 0
    assert_like_straight("run")


def test_a_level_that_breaks_is_not_begun_again(monkeypatch):
    """Catches a run that, resumed after an environment broke, plays its first episodes again, and
    so comes to the broken one again and again."""
    begin, begun = am.environments.Shard.begin, []

    def note(shard, i, options=None):
        first = begin(shard, i, options)
        if len(shard.envs) == 3:                             # not an evaluation's two
            begun.append(first[1])
            if len(begun) == 8:
                raise shard.broken(i, "its level is wrong")
        return first
    monkeypatch.setattr(am.environments.Shard, "begin", note)
    assert am.main(train(POLE, 300, "--out", "run")) == 1
    assert am.main(resume("run", 300)) == 0
    again, later = begun[8:11], begun[11:]                   # what a new Collector begins, and then
    assert again == begun[:3] and len(later) > 10
    assert not set(later) & set(begun[:8]) and len(numbers("run")) == 6


def test_python_cannot_start_over_in_a_folder_to_resume():
    """Catches train(Config(resume=DIR)), without the checkpoint, that writes over the run."""
    assert am.main(train(POLE, 120, "--out", "run")) == 0
    before = {path: path.read_bytes() for path in pathlib.Path("run").iterdir()}
    with pytest.raises(am.UsageError, match="also loads it"):
        am.train(am.Config(env=POLE, resume="run", env_steps=10, episodes=1))
    assert {path: path.read_bytes() for path in pathlib.Path("run").iterdir()} == before


def test_runs_that_start_at_once_get_a_folder_each():
    """Catches two runs in one folder: both had looked before either had written."""
    env = am.environments.make_env(POLE)

    def logs(**options):
        return [am.Log(am.Config(env=POLE, **options), env, "agent") for _ in range(2)]
    one, two = logs()
    assert one.folder == two.folder
    with one.files(lambda end: None), two.files(lambda end: None):
        assert one.folder != two.folder and (two.folder / "config.json").exists()
    one, two = logs(out="mine")
    with one.files(lambda end: None), pytest.raises(am.UsageError, match="mine cannot be written"):
        with two.files(lambda end: None):
            pass


def test_a_first_save_that_fails_leaves_the_results(monkeypatch, capfd):
    """Catches evaluations that are lost with the checkpoint, and a list of files that are not
    there."""
    def full(*_):
        raise OSError("no space")
    monkeypatch.setattr(am, "save_checkpoint", full)
    assert am.main(train(POLE, 60, "--out", "run")) == 1
    assert json.loads(pathlib.Path("run/eval.json").read_text())["env_steps"] == 60
    files = capfd.readouterr().out.splitlines()[-1]
    assert "eval.json" in files and "checkpoint.pt" not in files


def test_a_resumed_run_lets_its_checkpoint_go():
    """Catches a second copy of the replay buffer that stays until the run ends."""
    assert am.main(train(POLE, 120, "--out", "run")) == 0
    config, state = am.parse_command_line(["--resume", "run", "--env-steps", "180"])
    buffer = weakref.ref(state["processes"][0]["buffer"]["tokens"]["reward"])
    act, there = am.Collector.act, set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(am.Collector, "act", lambda self: (there.add(buffer() is not None),
                                                         act(self))[1])
        am.train(config, state)
    assert there == {False}


# ---- several processes (T22) ----


def ranks(call, seconds=60):
    """call(rank) in two forks that are ranks 0 and 1 of one job -> their exit codes. Each works in
    a folder of its own, rank0 and rank1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def run(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                          MASTER_ADDR="localhost", MASTER_PORT=str(port))
        os.makedirs(f"rank{rank}", exist_ok=True)
        os.chdir(f"rank{rank}")
        return call(rank) or 0
    pids = [fork(lambda: run(rank), f"rank{rank}") for rank in (0, 1)]
    try:
        return [exit_code(pid, seconds) for pid in pids]
    finally:
        for pid in pids:                                  # one that a failed test left behind
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)


def batch_of(spec, lengths, seed):
    """A fixed batch with rollouts of these lengths."""
    rng, buffer = np.random.default_rng(seed), am.ReplayBuffer(spec, 1000, np.random.default_rng(0))
    for length in lengths:
        steps = np.arange(length + 1)
        buffer.add(am.Trajectory(
            dict(vector=3 * seed + rng.normal(size=(length + 1, 3)).astype(np.float32)),
            rng.integers(spec.actions, size=length), rng.normal(seed, 2, length).astype(np.float32),
            steps[1:] == length, steps == 0))
    return lambda: buffer.sample(5, 9)


def union(a, b):
    """Both batches in one, the shorter padded."""
    def join(x, y):
        size = max(x.shape[1], y.shape[1])
        return torch.cat([torch.nn.functional.pad(z, (0, 0) * (z.dim() - 2) + (
            0, size - z.shape[1])) for z in (x, y)])
    return am.each(join, a, b)


def test_two_processes_learn_like_one(tmp_path):
    """Catches gradients, PopArt, input or sigma statistics that two processes do not share, or in
    which a process counts as much as the other although it has fewer steps: after 5 updates they
    have one state, which is that of one process that learned from both batches."""
    spec, config = am.Spec(vector=3, actions=4, horizon=9), am.Config(warmup=1, n_step=2)
    batches = [batch_of(spec, (9, 8, 7), 1), batch_of(spec, (2, 1, 3, 5), 2)]

    def learn(sample):
        torch.manual_seed(0)
        learner = am.Learner(am.Agent(spec, config).eval(), config)
        # Adam divides a gradient by its size: without this, rounding errors of gradients that
        # are zero would move weights by the full learning rate.
        learner.optimizer.param_groups[0]["eps"] = 1e-3
        info = [learner.update(sample()) for _ in range(5)]
        return learner.state(), info

    def rank(number):
        am.join_processes()
        torch.save(learn(batches[number])[0], "state.pt")
    codes = ranks(rank)
    assert codes == [0, 0], [pathlib.Path(f"rank{i}.err").read_text() for i in (0, 1)]
    first, second = (torch.load(tmp_path / f"rank{i}/state.pt") for i in (0, 1))
    assert different(first, second) == []
    one, _ = learn(lambda: union(*(sample() for sample in batches)))
    untrained = am.Learner(am.Agent(spec, config), config).state()["agent"]
    for name, x in one["agent"].items():
        torch.testing.assert_close(first["agent"][name], x, rtol=1e-4, atol=1e-5, msg=name)
    assert any(not torch.allclose(untrained[name], x, atol=1e-3) for name, x in
               one["agent"].items())


def test_two_processes_are_one_run(tmp_path):
    """Catches ranks that drift apart, play the same episodes, write the same files, or lose their
    own half of the state on --resume."""
    def main(argv, folder):
        def rank(number):
            learners = []
            save = am.save_run
            am.save_run = lambda folder, run, *more: (learners.append(run["learner"]),
                                                       save(folder, run, *more))
            if number == 1:                               # the other is far ahead, and writes
                call_at(am.environments.Log, "__init__", 1, lambda log, *arguments, made=(
                    am.environments.Log.__init__): (time.sleep(1), made(log, *arguments))[1])
            code = am.main([*map(str, argv)])
            torch.save(learners[-1].state(), tmp_path / f"{folder}-{number}.pt")
            return code
        codes = ranks(rank)
        assert codes == [0, 0], [pathlib.Path(f"rank{i}.err").read_text() for i in (0, 1)]
        return [torch.load(f"{folder}-{i}.pt") for i in (0, 1)]
    first, second = main(train(POLE, 300, "--out", "straight"), "straight")
    assert first["updates"] > 10 and different(first, second) == []
    main(train(POLE, 120, "--out", tmp_path / "run"), "half")
    first, second = main(resume(tmp_path / "run", 300), "run")
    assert different(first, second) == []
    assert os.listdir("rank1") == [] and pathlib.Path("rank1.out").read_text() == ""
    assert set(os.listdir("run")) == set(os.listdir("rank0/straight")) == {
        "config.json", "log.csv", "eval.json", "curve.png", "checkpoint.pt"}
    assert numbers("run") == numbers("rank0/straight")
    straight, run = saved("rank0/straight"), saved("run")
    assert different(essence(run), essence(straight)) == []
    a, b = run["processes"].values()
    assert a["rng"] != b["rng"] and not torch.equal(a["torch_rng"], b["torch_rng"])
    # A generator's increment is fixed by its seed, however many numbers it has drawn.
    a, b = ({generator["state"]["inc"] for *_, generator in json.loads(x["collector"]["envs"])}
            for x in (a, b))
    assert len(a) == len(b) == 3 and not a & b


@pytest.mark.parametrize("argv", [["--size", "smal"], train("popgim:X", 300)], ids=["size", "env"])
def test_a_job_complains_once(argv):
    """Catches one line of an error of usage for every process of a job, and silence."""
    assert ranks(lambda _: am.main(argv)) == [2, 2]
    assert "nearest" in one_line(pathlib.Path("rank0.err").read_text())
    assert pathlib.Path("rank1.err").read_text() == "" and os.listdir("rank0") == []


@pytest.mark.parametrize("how", ["dies", "breaks"])
def test_a_process_that_ends_takes_the_other_along(how):
    """Catches a job that waits for ever for a process that died or whose environment broke."""
    def rank(number):
        if number == 1 and how == "dies":
            call_at(am.Learner, "begin_update", 5, lambda *_: os._exit(7))
        if number == 1 and how == "breaks":
            call_at(am.environments.Shard, "check", 120, lambda self, i, _: (_ for _ in ()).throw(
                self.broken(i, "it broke")))
        return am.main(train(POLE, 300, "--out", "run", *SAVE_ALWAYS))
    codes = ranks(rank, seconds=40)
    errors = [pathlib.Path(f"rank{i}.err").read_text() for i in (0, 1)]
    assert codes == [1, 7 if how == "dies" else 1], errors
    assert "stopped: " in one_line(errors[0])
    if how == "breaks":
        assert "it broke" in one_line(errors[1])
    am.load_checkpoint("rank0/run")


JOB = """
import os, sys
sys.path.insert(0, {folder!r})
import amago_min as am
am.SIZES["nano"] = {size!r}
if os.environ["RANK"] == "1":
    def update(self, batch, begin_update=am.Learner.begin_update):
        if self.updates == {last}:
            os._exit(7)
        return begin_update(self, batch)
    am.Learner.begin_update = update
sys.exit(am.main())
"""


def test_torchrun_resumes_and_ends_when_a_process_dies(tmp_path):
    """Catches a job that torchrun cannot start or resume, and one that hangs, says nothing or seems
    to have ended well when a process died."""
    codes = ranks(lambda _: am.main(train(POLE, 120, "--out", str(tmp_path / "run"))))
    assert codes == [0, 0]
    updates = saved("run")["learner"]["updates"]
    (tmp_path / "job.py").write_text(JOB.format(folder=str(PROGRAM.parent), size=am.SIZES["nano"],
                                                last=updates + 10))
    job = subprocess.Popen([
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "job.py", *resume("run", 3000, *SAVE_ALWAYS)], stderr=subprocess.PIPE, text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"))
    try:
        stderr = job.communicate(timeout=180)[1]
    finally:
        job.terminate()                                   # and, with it, what it started
    assert job.returncode == 1, stderr
    assert "amago_min.py stopped: another process of this job ended\n" in stderr, stderr
    assert updates < am.load_checkpoint("run")[-1]["learner"]["updates"] <= updates + 10


# ---- worker processes ----


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_workers_end_with_their_parent():
    """Catches processes that a killed run leaves behind for ever."""
    pid = fork_main(train(POLE, 10**6, "--out", "run", "--workers", "2"))
    end, log = time.monotonic() + 60, pathlib.Path("run/log.csv")
    while time.monotonic() < end and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.05)
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    children = [int(x) for x in children.split()]
    assert len(children) >= 2 and all(map(alive, children))
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -9
    end = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, children))


def forked_workers(monkeypatch):
    """Workers that know the probes, too."""
    get = am.environments.multiprocessing.get_context
    monkeypatch.setattr(am.environments.multiprocessing, "get_context", lambda _: get("fork"))


class PaidInNumber0(Probe):
    """A reward for each step of the environment that is seeded first, none in the others."""
    horizon = 4

    def pay(self, action):
        return self.np_random_seed == 1_000_000


def test_what_exploration_has_counted_is_saved(monkeypatch):
    """Catches rollouts without a reward that nobody counts, or that a resumed run has forgotten:
    its noise would end before anything is found. Two of three environments never get one."""
    use(monkeypatch, PaidInNumber0)
    for arguments, rounds in ((train("probe", 60, "--out", "run"), 5), (resume("run", 120), 10)):
        assert am.main(arguments) == 0
        own = saved("run")["processes"][0]["collector"]
        assert (own["begun"], own["barren"]) == (3 + 3 * rounds, 3 + 2 * rounds)


def test_a_checkpoint_from_before_exploration_counted(monkeypatch):
    """Catches a run of an earlier version, whose environment broke, that cannot be resumed."""
    use(monkeypatch, PaidInNumber0)
    assert am.main(train("probe", 60, "--out", "run")) == 0
    state = saved("run")
    for count in ("begun", "barren"):
        del state["processes"][0]["collector"][count]
    am.save_checkpoint(pathlib.Path("run") / "checkpoint.pt", state)
    assert am.main(resume("run", 120)) == 0


class Faulty(Probe):
    """The one with number `bad` goes wrong at its 30th step."""
    horizon, lived, bad, wrong = 4, 0, 0, None

    def pay(self, action):
        self.lived += 1
        if self.lived == 30 and self.np_random_seed == 1_000_000 + self.bad:
            return self.wrong()
        return 1


WRONG = {"nan": lambda: math.nan, "error": lambda: 1 // 0, "death": lambda: os._exit(3)}


@pytest.mark.parametrize("wrong, bad", [("nan", 4), ("error", 0), ("death", 4)])
def test_a_worker_that_breaks(wrong, bad, monkeypatch, capfd):
    """Catches a run that hangs, ends in a traceback or without its checkpoint, or that blames an
    environment of another worker; and one that forgets how far exploration has come."""
    forked_workers(monkeypatch)
    use(monkeypatch, Faulty, bad=bad, wrong=WRONG[wrong])
    assert am.main(train("probe", 1000, "--out", "run", "--parallel-envs", "5", "--workers", "2",
                         *SAVE_ALWAYS)) == 1
    message = one_line(capfd.readouterr().err)
    assert "probe" in message or wrong == "death"
    assert (f"environment {bad}" in message) == (wrong != "death")
    what = {"nan": "reward is nan", "error": "ZeroDivisionError", "death": "worker"}
    assert what[wrong] in message
    state = am.load_checkpoint("run")[-1]
    assert state["env_steps"] >= 29 * 5
    # Seven rollouts of four steps are over, an eighth has begun; else noise would begin anew.
    collector = state["processes"][0]["collector"]
    assert collector["begun"] == 5 * 8 and "envs" not in collector     # in the middle of a step


def test_a_worker_that_cannot_begin(monkeypatch):
    """Catches a traceback, or a message of several lines, for an environment that only a worker
    cannot build."""
    def broken(*_):
        raise TypeError("many\nlines")
    forked_workers(monkeypatch)
    monkeypatch.setattr(am.environments, "Shard", broken)
    envs = am.environments.ParallelEnvs(POLE, np.arange(2), 2)
    with pytest.raises(am.BrokenEnvironment, match="gym:CartPole.*: TypeError: many lines"):
        envs.call("begin_all")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_are_started_deaf_to_signals(number, monkeypatch):
    """Catches a Ctrl-C, or a SIGTERM to all processes, that ends workers while they import torch.
    """
    handlers, start = [], am.environments.multiprocessing.context.ForkProcess.start
    forked_workers(monkeypatch)
    monkeypatch.setattr(am.environments.multiprocessing.context.ForkProcess, "start", lambda self: (
        handlers.append(signal.getsignal(number)), start(self))[1])
    before = signal.getsignal(number)
    am.environments.ParallelEnvs(POLE, np.arange(2), 2).close()
    assert handlers == [signal.SIG_IGN] * 2 and signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_everything(number):
    """Catches workers that end before the run has asked them for their environments, as when a
    cluster or `timeout` ends a job: SIGTERM to every process of it."""
    pid = fork_main(train(POLE, 10**6, "--out", "run", "--workers", "2"), os.setpgrp)
    end, log = time.monotonic() + 60, pathlib.Path("run/log.csv")
    while time.monotonic() < end and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.05)
    os.killpg(pid, number)
    assert exit_code(pid) == 130
    assert "saved" in one_line(pathlib.Path("fork.err").read_text())
    state = saved("run")
    assert "envs" in state["processes"][0]["collector"]
    assert am.main(resume("run", state["env_steps"] + 60)) == 0


def test_workers_do_not_outlive_their_owner():
    """Catches a program that never ends, because its workers do not hear that they should."""
    code = ("import numpy, envs; e = envs.ParallelEnvs('gym:CartPole-v1', numpy.arange(2), 2);"
            "print(len(e.call('begin_all')))")
    run = subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(am.__file__).parent,
                         capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "2\n", "")


def test_a_worker_that_is_gone_when_all_is_saved(monkeypatch):
    """Catches a finished run that loses its last checkpoint because a worker died meanwhile."""
    forked_workers(monkeypatch)
    real = am.environments.ParallelEnvs.state

    def killed(envs):
        envs.processes[0].kill()
        envs.processes[0].join()
        return real(envs)
    with monkeypatch.context() as patch:
        patch.setattr(am.environments.ParallelEnvs, "state", real)     # to be undone
        call_at(am.environments.ParallelEnvs, "state", 2, killed)      # the first is at the start
        assert am.main(train(POLE, 120, "--out", "run", "--workers", "2")) == 0
    state = saved("run")
    assert state["env_steps"] == 120 and state["learner"]["updates"] > 0
    assert am.main(resume("run", 300)) == 0
    assert len(numbers("run")) == 6


@pytest.mark.parametrize("moment", ["send", "receive"])
def test_a_worker_that_was_killed_once(moment, monkeypatch, capfd):
    """Catches a run that a dead worker, out of memory perhaps, has spoiled for good."""
    forked_workers(monkeypatch)
    real = getattr(am.environments.ParallelEnvs, moment)

    def killed(envs, *arguments):
        envs.processes[0].kill()
        envs.processes[0].join()
        return real(envs, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(am.environments.ParallelEnvs, moment, real)      # to be undone
        call_at(am.environments.ParallelEnvs, moment, 60, killed)
        assert am.main(train(POLE, 300, "--out", "run", "--workers", "2")) == 1
    assert "worker" in one_line(capfd.readouterr().err)
    state = saved("run")
    assert 30 < state["env_steps"] < 150 and state["learner"]["updates"] > 0
    assert am.main(resume("run", 300, "--workers", "0")) == 0
    assert len(numbers("run")) == 6
