"""Pages of docs/: their Python runs, in order, on tiny models; their commands parse; their links resolve.

A block of Python followed by a block of text must print that text. `make docs` builds the site from the pages.
"""

import contextlib
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro

import retentive
from retentive import cli
from retentive.checkpoint import save_model
from retentive.data.pack import pack
from retentive.data.sources import Document
from retentive.data.tokenizer import train_bpe
from retentive.models import LanguageModel, retnet

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md") if page.name != "LOG.md")
ROOMS = sorted(folder.parent.name for folder in Path(retentive.__file__).parent.glob("*/__init__.py"))
COMPILED_ONLY = {"scale-out.md", "evaluation.md", "scaling.md"}  # need servers, the hub, eight GPUs
PYTHON = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Makes what the pages refer to: my_texts/, data/mine packed from it, an untrained model of the smallest size."""
    root = tmp_path_factory.mktemp("docs")
    texts = [f"Once upon a time, {n} foxes lived in a wood.\n" * 40 for n in range(12)]
    (root / "my_texts").mkdir()
    for n, text in enumerate(texts):
        (root / "my_texts" / f"{n}.txt").write_text(text, encoding="utf-8")
    tokenizer = train_bpe(texts, 300)
    found = [Document(str(n), text) for n, text in enumerate(texts)]
    pack(root / "data" / "mine", tokenizer, found[2:], found[:2])
    torch.manual_seed(0)
    save_model(root / "runs" / "mine", LanguageModel(retnet("1m", vocab_size=tokenizer.vocab_size)), tokenizer)
    portable = retnet("1m", architecture="retnet-portable", vocab_size=tokenizer.vocab_size)
    save_model(root / "runs" / "portable", LanguageModel(portable), tokenizer)
    (root / "runs" / "demo").symlink_to("mine")
    question = {"goal": "To see a fox,", "sol1": "go into the wood.", "sol2": "go to sea.", "label": 0}
    (root / "eval_files").mkdir()
    (root / "eval_files" / "piqa.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON.search(read(page))])
def test_python(page, place, monkeypatch):
    monkeypatch.chdir(place)
    names: dict = {"__name__": page}
    for code, output in PYTHON.findall(read(page)):
        brief = re.sub(r"\bsteps=\d+", "steps=2", re.sub(r"\bmax_tokens=\d+", "max_tokens=4", code))
        compiled = compile(brief, page, "exec")
        if page in COMPILED_ONLY:
            continue
        if "infer.structured" in code:
            pytest.importorskip("llguidance", reason="needs the extra `structured`")
        if "AutoModel" in code:
            pytest.importorskip("transformers", reason="needs the extra `hf`")
            cli.main(["export", "runs/mine", "--to", "hf", "--out", "mine-hf"])
        if "peft" in code:
            pytest.importorskip("peft", reason="needs pip install peft")
        if "llama_cpp" in code:
            pytest.importorskip("llama_cpp", reason="needs pip install llama-cpp-python")
            cli.main(["export", "runs/portable", "--to", "gguf", "--out", "portable"])
        if "from vllm" in code:
            pytest.importorskip("vllm", reason="needs vLLM")
        if "mlx_lm" in code:
            pytest.importorskip("mlx_lm", reason="needs the extra `mlx`")
            cli.main(["export", "runs/mine", "--to", "mlx", "--out", "mine-mlx"])
        if "onnx_run" in code:
            pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
            cli.main(["export", "runs/mine", "--to", "onnx", "--out", "novels-onnx"])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compiled, names)
        assert not output or printed.getvalue() == output


class Parsed(BaseException):
    """Raised when a command line was parsed, to stop before it runs."""


def commands(text: str) -> list[str]:
    """Returns lines that call `retentive`, in shell blocks or indented, without comments."""
    shell = "\n".join(re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    indented = re.findall(r"^    (?=(?:\w+=\S+ )?retentive ).*$", text, re.MULTILINE)
    lines = [*shell.splitlines(), *indented]
    found = [re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )?(retentive .*)", line) for line in lines]
    return [match[1] for match in found if match]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(read(page))])
def test_commands_parse(page, monkeypatch):
    parse = tyro.cli

    def parsed(*args, **options):
        parse(*args, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parsed)
    monkeypatch.chdir(ROOT)  # contains recipes/
    for command in commands(read(page)):
        words = [word.replace("…", "") or "x" for word in shlex.split(command, comments=True)[1:]]
        # a reader's copy of a recipe
        words = [f"recipes/{word}" if (ROOT / "recipes" / word).is_file() else word for word in words]
        with pytest.raises(Parsed):
            cli.run([{"SIZE": "5m", "RUN": "runs/mine"}.get(word, word) for word in words])


@pytest.mark.parametrize("command", ["retentive train --data a --out b --sise 5m", "retentive teach"])
def test_the_check_of_commands_sees_a_flag_that_is_not_there(command):
    with pytest.raises((SystemExit, ValueError)):
        cli.run(shlex.split(command)[1:])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!\w+:)([^)\s#]+)", read(page)):
        target = (DOCS / page).parent / link
        made = target.name == "tables.md"  # written by docs/hooks.py when the site is built
        assert target.exists() or made, link


@pytest.mark.parametrize("diagram", sorted(DOCS.glob("diagrams/*.svg")), ids=lambda path: path.stem)
def test_diagrams_name_files_that_are_there(diagram):
    named = re.findall(r'class="file"[^>]*>([\w/.]+)<', diagram.read_text(encoding="utf-8"))
    files = [name for name in named if "/" in name]
    assert len(files) > 5 and [name for name in files if not (ROOT / "retentive" / name).exists()] == []


def test_every_page_has_its_place_in_the_site():
    listed = re.findall(r": ([\w/.-]+\.md)$|- ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    listed = {a or b for a, b in listed}
    made = {"CHANGELOG.md", "CONTRIBUTING.md", "results/tables.md", "results/files.md"}
    made |= {f"results/{page.name}" for page in (ROOT / "results").glob("*.md") if page.name != "README.md"}
    assert listed == made | {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}


def test_all_results_are_in_the_page_of_tables(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    text = importlib.import_module("figures").tables()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "results").glob("*.json")]
    commands = [result["command"] for result in results if result.get("command", "").startswith("retentive")]
    assert len(commands) > 20 and [command for command in commands if command not in text] == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_its_page_of_api_and_its_line(room):
    assert f"<!-- modules of retentive.{room}: " in read(f"api/{room}.md")
    assert f"| `{room}` |" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_one_address_of_the_repository():
    """pyproject.toml alone names it. While it does not, no other file does."""
    named = re.findall(r'^Repository = "https://github\.com/(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    files = [ROOT / name for name in ("README.md", "CITATION.cff", "mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md")]
    texts = [path.read_text(encoding="utf-8") for path in [*files, *(DOCS / page for page in PAGES)]]
    assert {address for text in texts for address in re.findall(r"github\.com/([\w.-]+/retentive)\b", text)} <= {*named}
