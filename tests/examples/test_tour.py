"""examples/tour.ipynb: every cell runs and draws, and the stored outputs are of a whole run and of no one's machine."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks are read by pip install nbformat")

FILE = Path(__file__).parents[2] / "examples" / "tour.ipynb"
SECTIONS = ("Train", "Decay", "Generate", "Three forms", "State", "Transformer")
PICTURES = 3
"""The training curve, the decay masks, the twin's curve and memory."""


@pytest.fixture
def notebook():
    return nbformat.read(FILE, as_version=4)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook) -> list:
    return [output for cell in code(notebook) for output in cell.outputs]


def pictures(notebook) -> list[str]:
    return [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]


def printed(notebook) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def check(notebook) -> None:
    """Asserts what holds in every run: pictures, equal forms, and a state that does not grow."""
    assert len(pictures(notebook)) == PICTURES
    text = printed(notebook)
    differences = [float(x) for x in re.findall(r"largest difference (\S+)", text)]
    # float32, float64 and float32: rounding of logits of size 10, in sums of a few hundred terms
    assert len(differences) == 3 and max(differences) < 1e-3 and differences[1] < 1e-10
    first, second = re.findall(r"tokens read, file of ([\d,]+) bytes", text)
    assert first == second
    retnet, twin = (int(x.replace(",", "")) for x in re.findall(r"([\d,]+) parameters", text))
    assert abs(retnet - twin) < 0.01 * twin


@pytest.mark.slow
def test_every_cell_runs(notebook, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run by pip install nbclient ipykernel")
    for name in ("ipykernel", "matplotlib", "pandas"):
        pytest.importorskip(name, reason=f"the notebook needs pip install {name}")
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    first = code(notebook)[0]
    assert "STEPS = 200\n" in first.source
    first.source = first.source.replace("STEPS = 200", "STEPS = 6")
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()
    check(notebook)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_the_stored_outputs_are_those_of_one_run(notebook):
    check(notebook)
    assert [cell.execution_count for cell in code(notebook)] == [*range(1, len(code(notebook)) + 1)]
    assert FILE.stat().st_size < 400_000


def test_the_stored_outputs_hold_no_error_and_no_path_of_a_machine(notebook):
    assert [output.output_type for output in outputs(notebook) if output.output_type == "error"] == []
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", FILE.read_text(encoding="utf-8"))
    assert re.findall(r"/(?:home|root|tmp|usr|work|Users)\b", without_pictures) == []


def test_its_headings_are_those_that_its_contents_name(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## \d\. (.+)$", text, re.MULTILINE) == [*SECTIONS]
    for n, name in enumerate(SECTIONS, 1):
        assert f"](#{n}.-{name.replace(' ', '-')})" in text
    for link in re.findall(r"\]\((?!\w+:|#)([^)#]+)\)", text):
        assert (FILE.parent / link).exists(), link
