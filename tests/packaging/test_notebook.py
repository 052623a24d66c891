"""docs/quickstart.ipynb: stored executed, without paths or warnings in its outputs, and it runs from top to bottom."""

import base64
import io
import json
import re

import nbformat
import pytest
from PIL import Image

from tests.helpers.notebook import NOTEBOOK, execute

STORE = "store fresh outputs with `python -m tests.helpers.notebook`"
PICTURES = {"show-pictures", "curves", "compare"}
COMMANDS = {"train", "export"}  # cells that end with a command's exit code
# A slash that starts a path: not one inside a relative path, a rate, a fraction, a URL or a closing tag.
ABSOLUTE = re.compile(r"(?<![\w.:/<~-])(?:/[A-Za-z_]\w*|~/|[A-Za-z]:\\)")


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """All text that a cell's outputs show."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        for kind, content in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield content


def pictures(cell):
    for output in cell.outputs:
        if "image/png" in output.get("data", {}):
            yield Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))


def check_outputs(notebook):
    """No errors, nothing on stderr, no absolute paths; pictures and exit codes where they belong."""
    for cell in code_cells(notebook):
        assert {output.output_type for output in cell.outputs} <= {"stream", "display_data", "execute_result"}
        assert "stderr" not in {output.get("name") for output in cell.outputs}, cell.id
        assert [text for text in texts(cell) if ABSOLUTE.search(text)] == []
        shown = [picture.convert("L").getextrema() for picture in pictures(cell)]
        assert len(shown) == (cell.id in PICTURES) and all(low < high for low, high in shown), cell.id
        if cell.id in COMMANDS:
            assert cell.outputs[-1].data["text/plain"] == "0"
    assert PICTURES | COMMANDS <= {cell.id for cell in notebook.cells}


def test_the_notebook_is_stored_executed():
    notebook = read()
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), STORE
    check_outputs(notebook)


def test_the_notebook_names_no_machine():
    """Metadata has neither the path of a kernel nor times of execution."""
    notebook = read()
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert [cell.id for cell in notebook.cells if cell.metadata] == []


def test_the_notebook_is_small():
    assert NOTEBOOK.stat().st_size < 400_000
    long = [
        cell.id for cell in code_cells(read()) if len([line for line in cell.source.splitlines() if line.strip()]) > 12
    ]
    assert long == []


def test_its_links_lead_to_pages():
    prose = "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """Takes more than 20 seconds: a kernel imports the whole stack, trains, generates pictures and exports.

    These are the steps that a newcomer takes first, and only the whole sequence shows that each cell finds what the
    cells before it made.
    """
    stored = read()
    executed = execute(stored, tmp_path)
    assert [cell.source for cell in executed.cells] == [cell.source for cell in stored.cells]
    check_outputs(executed)
    (folder,) = tmp_path.glob("seppo-quickstart-*")
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in log] == list(range(1, 17))
    assert (folder / "exported" / "model_index.json").is_file()
    kinds = [[output.output_type for output in cell.outputs] for cell in code_cells(executed)]
    assert kinds == [[output.output_type for output in cell.outputs] for cell in code_cells(stored)], STORE


@pytest.mark.parametrize(
    "text", ["/tmp", "saved in /home/someone/run", "File '/usr/x.py'", "(~/x)", r"C:\Users", "=/work/x"]
)
def test_an_absolute_path_is_noticed(text):
    assert ABSOLUTE.search(text)


@pytest.mark.parametrize("text", ["run/weights", "16.3 pairs/s", "update 1/16", "https://arxiv.org/abs/1", "</div>"])
def test_other_slashes_are_no_absolute_paths(text):
    assert not ABSOLUTE.search(text)
