"""README.md and amago_min.py say what is true: commands, tables, references, sizes.

`python tests/test_docs.py` writes the tables of options, columns and results into README.md, and
those of notebooks/results/notes.md.
"""

import ast
import dataclasses
import io
import json
import pathlib
import re
import shlex
import sys
import tokenize
import warnings

import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))

import amago_min as am  # noqa: E402 (after the path)
import mutate  # noqa: E402
from notebooks import tables  # noqa: E402

PROGRAM = (FOLDER / "amago_min.py").read_text()
README, NOTES = FOLDER / "README.md", FOLDER / "notebooks/results/notes.md"
needs_readme = pytest.mark.skipif(not README.exists(), reason="README.md is not written yet")


# ---- tables ----


def default_text(value):
    """A default as one would type it, '' for nothing."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def options_table():
    """One row per option: flag, default, meaning."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(am.Config):
        default = default_text(field.default)
        meaning = field.metadata["help"].replace("%%", "%").replace("<", "&lt;")
        choices = field.metadata["choices"]
        meaning += ": " + ", ".join(choices) if choices else ""
        flag = "--" + field.name.replace("_", "-")
        rows.append(f"| `{flag}` | {f'`{default}`' if default else ''} | {meaning} |")
    return "\n".join(rows)


def columns_table():
    """One row per column of log.csv."""
    rows = ["| column | meaning |", "|---|---|"]
    columns = am.environments.COLUMNS
    return "\n".join(rows + [f"| `{name}` | {about[-1]} |" for name, about in columns.items()])


TABLES = {"options": options_table, "columns": columns_table, **tables.TABLES}
HERE = [(page, name) for page in (README, NOTES) for name in TABLES
        if page.exists() and f"<!-- {name} -->" in page.read_text()]


def filled_in(text, name):
    """A page's text with the table between <!-- name --> and <!-- end -->."""
    head, found, rest = text.partition(f"<!-- {name} -->\n")
    assert found, f"no place for {name}"
    return head + found + TABLES[name]() + "\n" + rest[rest.index("<!-- end -->"):]


@pytest.mark.parametrize("page, name", HERE, ids=[name for _, name in HERE])
def test_pages_have_the_tables(page, name):
    """Catches a default, an option, a column or a log that changed after a page was written."""
    text = page.read_text()
    assert filled_in(text, name) == text, "run python tests/test_docs.py"


@needs_readme
def test_readme_has_the_tables_that_it_must_have():
    """Catches a marker that was lost, and with it the test above."""
    assert {name for _, name in HERE} == set(TABLES)


def write_run(folder, rows, commit="abc", **options):
    """A run's config.json and log.csv; rows of env_steps, updates, seconds, return, success."""
    folder.mkdir(parents=True)
    config = {**dataclasses.asdict(am.Config(**options)), "commit": commit, "versions": {}}
    (folder / "config.json").write_text(json.dumps(config))
    names = "env_steps,updates,seconds,return_mean,success,return_std"
    (folder / "log.csv").write_text("\n".join([names, *(row + ",0.1" for row in rows)]) + "\n")


def test_tables_of_results_by_hand(tmp_path, monkeypatch, capsys):
    """Catches a wrong row or column, a mean over other runs, and a run without a log that breaks
    the table."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    name = "popgym:RepeatPrevious"                            # where the paper has .997
    write_run(tmp_path / "popgym" / "a", ["0,0,0,-.5,", "1000,9,30,.98,", "2000,20,90,.9,"],
              env=name, seed=3)
    write_run(tmp_path / "popgym" / "b", ["0,0,0,-.5,"], env=name, seed=1, memory=1)
    write_run(tmp_path / "popgym" / "none", [], env=name)
    assert tables.popgym().splitlines()[2:] == [
        "| RepeatPreviousEasy, no memory | 1 | -0.500 | 0.997 | - | - | - | 0 | 0 | 0.00 |",
        "| RepeatPreviousEasy | 3 | 0.980 | 0.997 | 1,000 | 9 | 0.50 | 2,000 | 20 | 1.5 |"]
    assert "log.csv is empty" in capsys.readouterr().err

    for seed, score in ((1, ".991"), (0, "-.25")):
        write_run(tmp_path / "positions" / str(seed), [f"5000,9,9,{score},"], seed=seed, env=name,
                  positions="rotary")
    assert tables.positions().splitlines()[2:] == [
        "| `rotary` | 0: -.25 at 5,000<br>1: **.99** after 5,000 | not run | not run |"]

    write_run(tmp_path / "worlds" / "t", ["0,0,0,-1,0", "9,8,66,.5,.75"], env="tmaze:100")
    write_run(tmp_path / "worlds" / "u", ["0,0,0,-1,0"], tables.IN_NONE[0], env="tmaze:100")
    assert tables.worlds().splitlines()[2:] == [
        "| tmaze:100 | 0 | .50 | .50 | .75 | 9 | 8 | 1.1 | -.75 | 1.00 |"]
    assert tables.earlier().splitlines()[2:] == [
        "| tmaze:100 * | 0 | -1.00 | -1.00 | .00 | 0 | 0 | 0.00 | -.75 | 1.00 |"]

    maze = dict(env="maze:7x7?goals=1")
    write_run(tmp_path / "ablations" / "a", ["0,0,0,.1,.1", "9,1,60,.2,.2", "99,9,99,1,1"], **maze)
    write_run(tmp_path / "ablations" / "b", ["0,0,0,.1,.1", "8,2,120,.4,.6"], seed=1, **maze)
    write_run(tmp_path / "ablations" / "c", ["7,3,60,.3,.3", "9,4,90,1,1"],
              relabel="none", commit=tables.IN_ALL[0], explore_steps=200_000, **maze)
    write_run(tmp_path / "ablations" / "d", ["8,3,60,.3,.3"], env="tmaze:300",
              commit=tables.IN_NONE[0], explore_steps=200_000)
    assert tables.ablations().splitlines()[2:] == [           # at 8 steps, where run b ended
        "| maze:7x7?goals=1 | nothing | 0 1 | 8 | 1 | .25 (.10 to .40) | .35 (.10 to .60) | 1.0 |",
        "| maze:7x7?goals=1 + \u2020 | no relabeling | 0 | 8 | 3 | .30 | .30 | 1.0 |",
        "| tmaze:300 * \u00b0 | nothing | 0 | 8 | 3 | .30 | .30 | 1.0 |"]


@needs_readme
def test_readme_counts_no_tests():
    """Catches a number of tests, which is stale as soon as one is added."""
    assert re.findall(r"\d+ (?:passed|tests\b)", README.read_text()) == []


def test_every_column_is_explained():
    """Catches a column of log.csv that nobody can make sense of."""
    assert all(len(about[-1].split()) >= 3 for about in am.environments.COLUMNS.values())


def test_every_option_is_explained():
    """Catches an option without help, and one that --help does not show."""
    for field in dataclasses.fields(am.Config):
        assert len(field.metadata["help"].split()) >= 3, field.name


def test_help_names_every_option(capsys):
    """Catches a % in a help text that breaks --help."""
    with pytest.raises(SystemExit) as end:
        am.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for field in dataclasses.fields(am.Config):
        assert "--" + field.name.replace("_", "-") in text


# ---- commands ----


def commands_in(text):
    """The arguments of every `python amago_min.py ...` that starts a line or follows an &&."""
    lines = text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    return [shlex.split(line, comments=True)[2:] for line in lines
            if line.strip().startswith("python amago_min.py")]


def bash_blocks(markdown):
    return "\n".join(re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", markdown, re.S | re.M))


COMMANDS = commands_in(am.__doc__) + (commands_in(bash_blocks(README.read_text()))
                                      if README.exists() else [])


# What stands in a block of its own that is not marked as bash has not been run, but can be typed.
RECIPES = [command for block in re.findall(r"^```\n(python amago_min.py .*?)^```",
                                           README.read_text() if README.exists() else "",
                                           re.S | re.M) for command in commands_in(block)]


@pytest.mark.parametrize("command", COMMANDS + RECIPES, ids=" ".join)
def test_commands_can_be_typed(command):
    """Catches a command with an option or an environment that does not exist."""
    if "--help" not in command:
        values, _ = am.read_command_line(am.Config, "amago_min.py", command)
        am.environments.make_env(am.Config(**values).env)


# What a command must do, without the time that it takes: options in place of its own.
SMOKE = {"--env": "--env-steps 250 --parallel-envs 2 --batch 2 --replay-ratio 1"
         " --target-return none",
         "--resume": "--env-steps 500 --target-return none", "--eval": ""}


def smoke(command):
    """The command with a tiny budget; --resume may not change the rest of its run."""
    words, small = iter(command), f"{SMOKE[command[0]]} --episodes 2 --threads 1".split()
    kept, drop = [], {*small[::2], "--workers"}
    for flag, value in zip(words, words):                     # every option here takes one value
        assert flag.startswith("--") and not value.startswith("--"), command
        kept += [flag, value] if flag not in drop else []
    return kept + small


def test_commands_run_as_they_stand_one_after_another(tmp_path, monkeypatch, capsys):
    """Catches a command that stops, or that needs a file which no command before it has made."""
    commands = [command for i, command in enumerate(COMMANDS)
                if "--help" not in command and command not in COMMANDS[:i]]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").symlink_to(FOLDER / "notebooks")
    shown = sorted({command[command.index("--render") + 1] for command in commands
                    if "--render" in command})
    for command in commands:
        code = am.main(smoke(command))
        assert code == 0, (command, capsys.readouterr().err)
        assert "return" in capsys.readouterr().out
    assert shown and all((tmp_path / path).stat().st_size > 1000 for path in shown)


@needs_readme
def test_the_environment_to_add_runs(tmp_path, monkeypatch):
    """Catches an example that README tells to copy and that does not work, or is not that short."""
    section = README.read_text().partition("### Add your own")[2].partition("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    command, = re.findall(r"`python (amago_min.py [^`]*)`", section)
    (tmp_path / "echo_env.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert am.main(smoke(shlex.split(command)[1:])) == 0
    assert (tmp_path / "runs" / "gym-echo-env-Echo-v0-0" / "eval.json").exists()
    assert code.count("\n") <= 25


@needs_readme
def test_the_world_with_instructions_to_add_runs(tmp_path, monkeypatch, capsys):
    """Catches an example whose goals are not asked for, reached or relabeled as README says."""
    section = README.read_text().partition("### Add your own")[2].partition("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.S)[1]
    commands = [shlex.split(x) for x in re.findall(r"`python walk.py ([^`]*)`", section)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").symlink_to(FOLDER / "notebooks")
    monkeypatch.setattr(am.environments, "SUITES", dict(am.environments.SUITES))
    exec(code, dict(__name__="walk"))
    relabeled = []
    monkeypatch.setattr(am, "relabel", lambda x, *how, really=am.relabel: (
        relabeled.append((x, really(x, *how))), relabeled[-1][1])[1])
    assert [am.main(smoke(command)) for command in commands] == [0, 0]
    assert any(new.reward.sum() > old.reward.sum() for old, new in relabeled)
    assert "goal 2: done in" in capsys.readouterr().out and (tmp_path / "walk.png").exists()


@needs_readme
def test_an_agent_acts_from_python_as_readme_says(tmp_path, monkeypatch, capsys):
    """Catches lines to copy that stop, or that play no rollout."""
    monkeypatch.chdir(tmp_path)
    assert am.main(smoke(["--env", "popgym:RepeatPrevious"])) == 0
    section = README.read_text().partition("**From Python**")[2]
    exec(re.search(r"```python\n(.*?)```", section, re.S)[1], names := {})
    assert len(names["ended"][0][1]) == 51 and "return_mean" in capsys.readouterr().out


def test_there_are_commands():
    """Catches a test above that tests nothing."""
    assert len(commands_in(am.__doc__)) >= 4
    assert commands_in("python amago_min.py --env a \\\n    --seed 1   # why\n") == [
        ["--env", "a", "--seed", "1"]]
    assert "python" in bash_blocks("x\n```bash\npython y\n```\n")


@needs_readme
@pytest.mark.parametrize("page", [README, NOTES], ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    """Catches a link, an image or a script that leads nowhere."""
    text = page.read_text()
    for target, part in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", text):
        target = (page.parent / target) if target else page
        assert "http" in str(target) or target.exists(), target
        if part:
            titles = re.findall(r"^#+ (.+)", target.read_text(), re.M)
            assert part in [re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in titles]
    written = re.findall(r"Put this into `([\w.]+)`", text)
    for target in re.findall(r"python ([\w/]+\.py)", text):
        assert target in written or (FOLDER / target).exists(), target


@needs_readme
def test_readme_is_finished():
    """Catches a number that was never filled in."""
    assert re.findall(r"@@\w+@@|TODO|XXX", README.read_text()) == []


@needs_readme
def test_sections_of_the_file_are_those_in_readme():
    """Catches a section that was added, renamed or moved."""
    how_to_read = README.read_text().partition("## How to read")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| (\d+) ([^|]+) \|", how_to_read, re.M)
    real = re.findall(r"^# (\d+)\. (.+)", PROGRAM, re.M)
    assert len(shown) == len(real) > 5
    for (number, title), (real_number, real_title) in zip(shown, real):
        assert number == real_number and real_title.startswith(title)


# ---- references ----


def test_references_and_citations_agree():
    """Catches [9] without an entry in the list, and an entry that nothing refers to."""
    tokens = tokenize.generate_tokens(io.StringIO(PROGRAM).readline)
    words = "\n".join(token.string for token in tokens
                      if token.type in (tokenize.COMMENT, tokenize.STRING))
    head, _, rest = words.partition("\nReferences\n")
    listing, _, body = rest.partition('"""')
    listed = re.findall(r"^ +\[(\d+)\]", listing, re.M)
    cited = re.findall(r"(?<!\w)\[(\d+)\]", head + body)                # [1], but not x[1]
    assert listed == [str(i + 1) for i in range(len(listed))]
    assert set(cited) == set(listed)


# ---- sizes ----


OURS = sorted(path.relative_to(FOLDER).as_posix() for pattern in ("*.py", "notebooks/*.py",
                                                                  "tests/**/*.py")
              for path in FOLDER.glob(pattern))


def test_all_files_are_looked_at():
    """Catches tests below that look at nothing."""
    assert {"amago_min.py", "envs.py", "notebooks/plots.py", "tests/test_docs.py",
            "tests/benchmarks/speed.py"} < set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_lines_are_at_most_100_columns(name):
    for number, line in enumerate((FOLDER / name).read_text().splitlines(), 1):
        assert len(line) <= 100, f"{name}:{number} has {len(line)} columns"


def test_the_file_is_at_most_1500_lines():
    assert PROGRAM.count("\n") <= 1500


@pytest.mark.parametrize("name", OURS)
def test_functions_are_at_most_45_lines(name):
    """train, the one place where everything comes together, may have 80."""
    for node in ast.walk(ast.parse((FOLDER / name).read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (80 if node.name == "train" else 45), f"{node.name} has {lines} lines"


@pytest.mark.parametrize("bug, name, old", [row[:3] for row in mutate.MUTANTS])
def test_mutations_can_be_made(bug, name, old):
    """Catches a line that was changed since a mutation of it was written, before CI does."""
    assert (FOLDER / name).read_text().count(old) == 1


# ---- warnings ----


@pytest.mark.parametrize("kind", [UserWarning, DeprecationWarning, ResourceWarning])
@pytest.mark.parametrize("module", ["envs", "amago_min", "notebooks.plots", "probes", "test_docs"])
def test_a_warning_from_our_own_files_is_an_error(module, kind):
    """Catches a conftest.py that lets one pass."""
    with pytest.raises(kind):
        exec("import warnings; warnings.warn('a word', kind)", {"__name__": module, "kind": kind})


def test_a_warning_from_other_files_is_not():
    """Catches a suite that fails on what only other packages can mend."""
    with warnings.catch_warnings(record=True) as seen:        # the filters stay as they are
        for module in ("torch.nn", "envs2", "gymnasium.envs"):
            exec("import warnings; warnings.warn('a word')", {"__name__": module})
    assert len(seen) == 3


def test_the_first_exercise_expects_what_its_log_says():
    """Catches numbers of a log that a newer run has replaced."""
    text = (FOLDER / "notebooks" / "exercises.md").read_text()
    curve = tables.plots.Curve.read(FOLDER / re.search(r'RUN = "(.*)"', text)[1])

    def first(folder, column, passes):
        values, steps = curve.columns[column], curve.columns["env_steps"]
        return next((int(n) for n, x in zip(steps, values) if passes(x)), None)
    claims = re.findall(r"assert (first\(RUN, .*\)) (?:==|is) (.*)", text)
    assert len(claims) == 4
    for call, expected in claims:
        assert eval(call, dict(first=first, RUN=None)) == eval(expected), call


if __name__ == "__main__":
    for page, name in HERE:
        page.write_text(filled_in(page.read_text(), name))
