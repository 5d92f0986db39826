"""The report holds every committed result, loads nothing from elsewhere and invents nothing; damage is named."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import retentive
from retentive.cli import main
from retentive.report import build
from retentive.report.page import kind_of, read, to_html
from retentive.report.sections import SECTIONS

RESULTS = Path(retentive.__file__).parents[1] / "results"
HARDWARE = {"cpu": "A <chip>", "threads": 2, "gpu": "none", "torch": "2.13", "python": "3.11"}


def write(folder: Path, name: str, **result) -> Path:
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"hardware": HARDWARE, **result}), encoding="utf-8")
    return file


EVAL = dict(
    command="retentive eval runs/a --tasks piqa",
    what="tasks",
    results=[{"task": "piqa", "shots": 0, "n": 9, "metric": "acc", "value": 0.5, "interval": [0.25, 0.75]}],
)


class Balanced(HTMLParser):
    """Counts open tags."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no committed results beside the package")
def test_the_committed_results_make_a_whole_page():
    page = build(RESULTS)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    for file in RESULTS.glob("*.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        assert file.name in page or html.escape(result["command"]) in page, file.name
        assert html.escape(result["hardware"]["cpu"]) in page
    files = [read(file) for file in RESULTS.glob("*.json")]
    pictures = sum(file.table is not None and file.path.with_suffix(".png").is_file() for file in files)
    assert page.count("data:image/png;base64,") == pictures
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page


def test_a_result_stands_in_its_section_with_its_machine_and_command(tmp_path):
    write(tmp_path, "tasks_chip", **EVAL)
    (tmp_path / "tasks_chip.png").write_bytes(b"\x89PNG1")
    page = build(tmp_path)
    section = page[page.index('id="tasks"') : page.index('id="training-cost"')]
    assert "A &lt;chip&gt;, 2 threads, torch 2.13" in section and "retentive eval runs/a --tasks piqa" in section
    assert "<td>piqa</td>" in section and "0.25 to 0.75" in section and "data:image/png;base64,iVBORzE=" in section
    assert page.count("Not measured.") == len(SECTIONS) - 1


def test_texts_by_context_and_tasks_are_told_apart(tmp_path):
    by_context = [{**EVAL["results"][0], "context": 512}]
    write(tmp_path, "contexts", **{**EVAL, "results": by_context})
    page = build(tmp_path)
    assert "<td>512</td>" in page[page.index('id="longer-contexts"') : page.index('id="recall"')]


def test_a_bench_that_the_package_does_not_have_brings_its_table(tmp_path):
    write(tmp_path, "recall", command="retentive bench recall --dims 16", table="| a |\n| --- |\n| told |")
    page = build(tmp_path)
    assert "<td>told</td>" in page[page.index('id="recall"') : page.index('id="tasks"')]


@pytest.mark.parametrize(
    ("command", "kind"),
    [("retentive compare --data x", "compare"), ("retentive bench decode --size 5m", "bench decode"),
     ("python -m benchmarks recall --json x", "bench recall"), ("", "?")],
)  # fmt: skip
def test_kinds_of_commands(command, kind):
    assert kind_of(command) == kind


def test_what_no_section_knows_is_listed(tmp_path):
    write(tmp_path, "strange", command="retentive demo", what="something <else>")
    page = build(tmp_path)
    assert "<code>strange.json</code>: something &lt;else&gt;" in page


BAD = {
    "not-json": ("{", "is no file of results"),
    "a-list": ("[]", "is no file of results"),
    "no-hardware": ("{}", "is no file of results"),
    "half-a-machine": ('{"hardware": {"cpu": "x"}}', "is no file of results"),
    "no-command": (json.dumps({"command": 3, "hardware": HARDWARE}), "is no file of results"),
    "open-quotation": (json.dumps({"command": "retentive 'eval", "hardware": HARDWARE}), "is no file of results"),
    "no-rows": (json.dumps({"command": "retentive bench decode", "hardware": HARDWARE}), "does not hold what"),
    "no-failures": (
        json.dumps({"command": "retentive compare --data x", "hardware": HARDWARE, "rows": [], "failed": None}),
        "does not hold what",
    ),
    "other-rows": (
        json.dumps({"command": "retentive compare --data x", "hardware": HARDWARE, "rows": [{"a": 1}]}),
        "does not hold what",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_named(case, tmp_path, refuses):
    text, words = BAD[case]
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    with refuses(words):
        build(tmp_path)
    with refuses("bad.json"):
        build(tmp_path)


def test_folders_without_results_are_refused(tmp_path, refuses):
    with refuses("no result; `retentive bench`", FileNotFoundError):
        build(tmp_path)
    with refuses("no folder", FileNotFoundError):
        build(tmp_path / "nothing")


def test_markdown_of_results():
    page = to_html("A line\nand more <b>.\n\n| a | b |\n| --- | ---: |\n| x & y | 1 |\n\n- one\n- two")
    assert page == (
        '<p>A line and more &lt;b&gt;.</p><div class="wide"><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody>'
        "<tr><td>x &amp; y</td><td>1</td></tr></tbody></table></div><ul><li>one</li><li>two</li></ul>"
    )


def test_the_command_writes_the_page_whole(tmp_path, capsys):
    write(tmp_path, "tasks_chip", **EVAL)
    main(["report", "--results", str(tmp_path), "-o", str(tmp_path / "out" / "page.html")])
    assert (tmp_path / "out" / "page.html").read_text(encoding="utf-8") == build(tmp_path)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["page.html"]
    for argv, words in (
        (["--results", str(tmp_path / "nothing")], "retentive: no folder"),
        (
            ["-o", str(tmp_path / "out")],
            f"out is a folder: name the file of the page, as -o {tmp_path / 'out'}/report.html",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["report", *argv])
        line = capsys.readouterr().err
        assert stop.value.code == 2 and words in line and line.count("\n") == 1
