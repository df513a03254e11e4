"""README.md and amago_min.py say what is true: commands, tables, references, sizes.

`python tests/test_docs.py` writes the tables of options and columns into README.md.
"""

import ast
import dataclasses
import io
import pathlib
import re
import shlex
import sys
import tokenize

import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))

import amago_min as am  # noqa: E402 (after the path)

PROGRAM = (FOLDER / "amago_min.py").read_text()
README = FOLDER / "README.md"
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


TABLES = {"options": options_table, "columns": columns_table}


def filled_in(text, name):
    """README.md's text with the table between <!-- name --> and <!-- end -->."""
    head, found, rest = text.partition(f"<!-- {name} -->\n")
    assert found, f"README.md has no place for {name}"
    return head + found + TABLES[name]() + "\n" + rest[rest.index("<!-- end -->"):]


@needs_readme
@pytest.mark.parametrize("name", TABLES)
def test_readme_has_the_table(name):
    """Catches a default, an option or a column that changed after README was written."""
    text = README.read_text()
    assert filled_in(text, name) == text, "run python tests/test_docs.py"


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


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_can_be_typed(command):
    """Catches a command with an option or an environment that does not exist."""
    if "--help" not in command:
        values, _ = am.read_command_line(am.Config, "amago_min.py", command)
        am.environments.make_env(values["env"])


def test_there_are_commands():
    """Catches a test above that tests nothing."""
    assert len(commands_in(am.__doc__)) >= 4
    assert commands_in("python amago_min.py --env a \\\n    --seed 1   # why\n") == [
        ["--env", "a", "--seed", "1"]]
    assert "python" in bash_blocks("x\n```bash\npython y\n```\n")


@needs_readme
def test_files_that_readme_names_exist():
    """Catches a link, an image or a script that leads nowhere."""
    text = README.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"python ([\w/]+\.py)", text):
        assert target.startswith("http") or (FOLDER / target).exists(), target


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


@pytest.mark.parametrize("path", sorted([FOLDER / "amago_min.py", FOLDER / "envs.py",
                                         *(FOLDER / "tests").glob("*.py")]), ids=lambda p: p.name)
def test_lines_are_at_most_100_columns(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 100, f"{path.name}:{number} has {len(line)} columns"


def test_the_file_is_at_most_1500_lines():
    assert PROGRAM.count("\n") <= 1500


@pytest.mark.parametrize("name", ["amago_min.py", "envs.py", "notebooks/plots.py"])
def test_functions_are_at_most_45_lines(name):
    """train, the one place where everything comes together, may have 80."""
    for node in ast.walk(ast.parse((README.parent / name).read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (80 if node.name == "train" else 45), f"{node.name} has {lines} lines"


if __name__ == "__main__":
    text = README.read_text()
    for name in TABLES:
        text = filled_in(text, name)
    README.write_text(text)
