"""Notebooks: execute them from a fresh kernel, and say what is wrong with those that are saved.

    python tests/run_notebooks.py             # all in smoke mode: small budgets, every assertion on
    python tests/run_notebooks.py 03 05       # these two
    python tests/run_notebooks.py --write 03  # in full, and save what comes out

Smoke mode is the environment variable AMAGO_SMOKE=1, which a notebook reads where it sets a budget.
CI runs the first line; tests/test_notebooks.py runs `faults` on what is committed.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SOURCE = {line.strip() for name in ("amago_min.py", "envs.py")
          for line in (ROOT / name).read_text().splitlines()}
MOST_CELLS, MOST_LINES, MOST_BYTES, MOST_SECONDS = 20, 150, 300_000, 180


def paths(words=()):
    found = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    return [p for p in found if not words or any(p.name.startswith(w) for w in words)]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def lines_of_code(notebook):
    lines = [line for cell in code_cells(notebook) for line in cell.source.splitlines()]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def printed_source(cell):
    """The indented lines that a cell printed, if it prints source or docstrings of the files."""
    if not any(word in cell.source for word in ("getsource(", "getdoc(", "show(am.", "show(env")):
        return []
    return [line for output in cell.outputs for line in output.get("text", "").splitlines()
            if line.startswith("    ")]


def faults(path):
    """What is wrong with a saved notebook, one line each; an empty list if nothing is."""
    notebook = nbformat.read(path, as_version=4)
    cells, found = code_cells(notebook), []
    if len(notebook.cells) > MOST_CELLS:
        found.append(f"{len(notebook.cells)} cells, at most {MOST_CELLS}")
    if lines_of_code(notebook) > MOST_LINES:
        found.append(f"{lines_of_code(notebook)} lines of code, at most {MOST_LINES}")
    if path.stat().st_size > MOST_BYTES:
        found.append(f"{path.stat().st_size:,} bytes, at most {MOST_BYTES:,}")
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("cells were not executed once each, from top to bottom")
    outputs = [output for cell in cells for output in cell.outputs]
    if any(output.output_type == "error" for output in outputs):
        found.append("an error is saved in it")
    if any(output.get("name") == "stderr" for output in outputs):
        found.append("something on stderr is saved in it: " + next(
            o.text.splitlines()[0] for o in outputs if o.get("name") == "stderr"))
    if not any("image/png" in output.get("data", {}) for output in outputs):
        found.append("no figure is saved in it")
    if not any(line.startswith("assert ") for cell in cells for line in cell.source.splitlines()):
        found.append("it asserts nothing")
    saved = "".join(str(output.get("text", "")) + str(output.get("data", "")) for output in outputs)
    found += [f"it prints source that is no longer there: {line.strip()}"
              for cell in cells for line in printed_source(cell) if line.strip() not in SOURCE][:1]
    if str(ROOT) in saved or str(Path.home()) + "/" in saved:
        found.append("a path of the machine that ran it is saved in it")
    return found


def execute(path, smoke):
    """Run all cells in a fresh kernel; returns the notebook with its outputs, and the seconds."""
    os.environ["AMAGO_SMOKE"] = "1" if smoke else ""
    notebook = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    NotebookClient(notebook, timeout=900, kernel_name="python3", coalesce_streams=True,
                   resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in code_cells(notebook):
        cell.metadata.pop("execution", None)           # times of day: noise in every diff
    return notebook, time.perf_counter() - began


def run(path, write):
    """Execute one notebook and, if asked to, save it; print how it went, return if it is bad."""
    try:
        notebook, seconds = execute(path, smoke=not write)
    except (CellExecutionError, CellTimeoutError) as error:
        print(f"{path.name}: FAILED\n{error}", flush=True)
        return True
    if write:
        nbformat.write(notebook, path)
    wrong = faults(path)
    said = [o.text for cell in code_cells(notebook) for o in cell.outputs
            if o.get("name") == "stderr"]
    wrong += [f"on stderr: {text.strip()}" for text in said if "Warning" in text]
    if write and seconds > MOST_SECONDS:
        wrong.append(f"took {seconds:.0f} s, at most {MOST_SECONDS}")
    print(f"{path.name}: {'; '.join(wrong) or 'ok'} ({seconds:.0f} s)", flush=True)
    return bool(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="numbers of notebooks, such as 03; all if none")
    parser.add_argument("--write", action="store_true", help="in full, and save the outputs")
    options = parser.parse_args()
    found = paths(options.words) or sys.exit("tests/run_notebooks.py: no such notebook")
    # Side by side, but for those to be saved, whose seconds are shown.
    with ThreadPoolExecutor(1 if options.write else os.cpu_count()) as pool:
        bad = list(pool.map(lambda path: run(path, options.write), found))
    return int(any(bad))


if __name__ == "__main__":
    sys.exit(main())
