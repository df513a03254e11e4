"""Notebooks as they are saved; `tests/run_notebooks.py` executes them."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import run_notebooks

PNG = new_output("display_data", data={"image/png": "aGVsbG8="})


@pytest.mark.parametrize("path", run_notebooks.paths(), ids=lambda path: path.stem)
def test_saved_notebook(path):
    """Catches what `faults` names."""
    assert run_notebooks.faults(path) == []


def cell(source="assert True", count=1, outputs=(PNG,)):
    return new_code_cell(source, execution_count=count, outputs=list(outputs))


@pytest.mark.parametrize("fault, cells", [
    (None, [new_markdown_cell("# Title"), cell(), cell("# nothing", 2)]),
    ("21 cells, at most 20", [cell()] + [new_markdown_cell("") for _ in range(20)]),
    ("151 lines of code, at most 150", [cell("assert True\n\n# no code\n" + "x = 1\n" * 150)]),
    (" bytes, at most 300,000", [cell(), new_markdown_cell("x" * 300_000)]),
    ("cells were not executed once each, from top to bottom", [cell(count=2), cell(count=1)]),
    ("cells were not executed once each, from top to bottom", [cell(count=None)]),
    ("an error is saved in it", [cell(outputs=[PNG, new_output("error", ename="E", evalue="",
                                                               traceback=[])])]),
    ("something on stderr is saved in it: a warning", [
        cell(outputs=[PNG, new_output("stream", name="stderr", text="a warning\nof two lines")])]),
    ("it prints source that is no longer there: gone = 1", [
        cell("show(am.Agent.loss)\nassert True", outputs=[PNG, new_output(
            "stream", text="class Agent(nn.Module):\n    gone = 1\n")])]),
    ("no figure is saved in it", [cell(outputs=[])]),
    ("it asserts nothing", [cell("x = 1")]),
    ("a path of the machine that ran it is saved in it", [
        cell(outputs=[PNG, new_output("stream", text=f"{run_notebooks.ROOT}/x")])]),
])
def test_every_fault_is_found(tmp_path, fault, cells):
    """Catches a check that passes whatever a notebook holds."""
    path = tmp_path / "00_x.ipynb"
    notebook = new_notebook(cells=cells)
    for number, one in enumerate(notebook.cells):
        one["id"] = f"cell{number}"
    nbformat.write(notebook, path)
    found = run_notebooks.faults(path)
    assert not found if fault is None else len(found) == 1 and found[0].endswith(fault), found
