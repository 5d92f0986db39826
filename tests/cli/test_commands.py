"""Output and files of each verb against the library underneath it, and its --help against its fields."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import textwrap
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

import benchmarks
import retentive
from benchmarks.__main__ import run as program
from retentive import native
from retentive.bench import BENCHES
from retentive.cli import (
    ALIASES,
    VERBS,
    chat,
    compare,
    completion,
    convert,
    data,
    demo,
    export,
    generate,
    info,
    main,
    memory,
    quantize,
    renamed,
    report,
    serve,
)
from retentive.cli import eval as evaluation
from retentive.cli import train as training
from retentive.compare import Comparison
from retentive.data.prepare import DataConfig
from retentive.infer import SamplingParams
from retentive.infer import generate as generated
from retentive.linearization import LinearizeRun
from retentive.models import PRESETS, ModelConfig, cost
from retentive.models.presets import Size, flat
from retentive.ops import backends
from retentive.serve.options import Options
from retentive.train import TrainConfig, TrainRun
from retentive.train.parallel import Parallel
from retentive.train.sft import SftRun

COMMANDS = {
    "demo": demo.DemoCommand,
    "data": data.DataCommand,
    "train": TrainRun,
    "sft": SftRun,
    "linearize": LinearizeRun,
    "generate": generate.GenerateCommand,
    "memory write": memory.WriteCommand,
    "memory ask": memory.AskCommand,
    "memory merge": memory.MergeCommand,
    "memory show": memory.ShowCommand,
    "serve": serve.ServeCommand,
    "chat": chat.ChatCommand,
    "eval": evaluation.EvalCommand,
    "info": info.InfoCommand,
    "quantize": quantize.QuantizeCommand,
    "convert": convert.ConvertCommand,
    "export": export.ExportCommand,
    "compare": compare.CompareCommand,
    "report": report.ReportCommand,
    "completion": completion.CompletionCommand,
    **{f"bench {name}": importlib.import_module(module).Options for name, module in BENCHES.items()},
}
BENCHMARKS = {name: importlib.import_module(module).Options for name, module in benchmarks.BENCHES.items()}
INNER = {"train": TrainConfig, "sampling": SamplingParams, "options": Options}
INNER |= {"comparison": Comparison, "config": DataConfig, "parallel": Parallel}
"""Fields that are dataclasses themselves, whose fields are the command's."""


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_usage_names_every_verb(argv, capsys):
    main(argv)
    shown = capsys.readouterr().out
    assert shown.startswith("usage: retentive COMMAND")
    assert all(re.search(rf"^  {verb} +{re.escape(text)}$", shown, re.MULTILINE) for verb, (_, text) in VERBS.items())


def test_names_of_other_tools_are_options_of_training():
    assert renamed("--learning-rate=3e-3") == "--lr=3e-3" and renamed("--lr") == "--lr"
    own = {f"--{f.name.replace('_', '-')}" for kind in (TrainRun, TrainConfig) for f in fields(kind)}
    assert set(ALIASES.values()) <= own and not own & set(ALIASES)


@pytest.mark.parametrize("argv", [["help", "sft"], ["version"]], ids=str)
def test_words_in_place_of_flags(argv, capsys):
    with suppress(SystemExit):
        main(argv)
    shown = capsys.readouterr().out
    assert shown.startswith("usage: retentive sft" if argv[0] == "help" else f"retentive {retentive.__version__}")


def test_every_verb_has_its_module():
    assert all(callable(importlib.import_module(module).main) for module, _ in VERBS.values())
    assert {name.split()[0] for name in COMMANDS} == set(VERBS)


def texts(cls) -> dict[str, str]:
    """The line of text under each field of a dataclass, those of a dataclass among its fields too; "" where none is."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    found = {}
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[statement.target.id] = inspect.cleandoc(after.value.value) if said else ""
    for field, inner in INNER.items():
        if field in found and cls is not inner:
            found.pop(field)
            found |= texts(inner)
    for base in filter(is_dataclass, cls.__bases__):
        found = texts(base) | found
    return found


@pytest.mark.parametrize(
    ("command", "cls", "program"),
    [(name, cls, None) for name, cls in COMMANDS.items()] + [(n, c, program) for n, c in BENCHMARKS.items()],
)
def test_help_says_what_stands_under_every_field(command, cls, program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"], program)
    assert stop.value.code == 0
    shown, errors = capsys.readouterr()
    assert not errors

    def bare(text: str) -> str:
        return re.sub(r"[\s│]", "", text)

    assert is_dataclass(cls) and bare(cls.__doc__) in bare(shown)
    said = texts(cls)
    assert said.keys() >= {f.name for f in fields(cls)} - INNER.keys()
    for name, text in said.items():
        assert text, f"{cls.__name__}.{name} has no line of text under it"
        assert bare(text) in bare(shown), f"{cls.__name__}.{name}"


@pytest.mark.parametrize("argv", [[], ["--help"]], ids=" ".join)
def test_bench_names_its_measurements(argv, capsys):
    benches = {name.removeprefix("bench "): cls for name, cls in COMMANDS.items() if name.startswith("bench ")}
    for words, run, named in ((["bench", *argv], None, benches), (argv, program, BENCHMARKS)):
        main(words, run)
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown and cls.__doc__ in shown for name, cls in named.items())


def test_from_text_to_a_model_in_another_layout(place, train, capsys):
    """data, train, generate, info, convert, and generate again from what was converted."""
    main(["data", "corpus", "--out", "mine", "--tokenizer", "bytes", "--valid-fraction", "0.3", "--seed", "1"])
    main(train("new", "--data", "mine"))
    model, tokenizer = retentive.load("new")
    lines = [json.loads(line) for line in Path("new/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    capsys.readouterr()

    greedy = ["--prompt", "The ", "--max-tokens", "12", "--temperature", "0"]
    main(["generate", "new", *greedy])
    text = capsys.readouterr().out
    assert text.startswith("The ") and text.endswith("\n")

    main(["info", "new"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{cost.parameters(model.config):,} parameters" in shown and "RetNet, new (retentive layout)" in shown
    assert "trained 4 steps" in shown and "decay=paper" in shown
    assert f"smaller than the Transformer's from {cost.break_even(model.config):,} tokens" in shown

    main(["convert", "new", "theirs", "--to", "torchscale"])
    assert "decoder_retention_heads" in Path("theirs/config.json").read_text(encoding="utf-8")
    main(["convert", "theirs", "ours"])
    capsys.readouterr()
    for folder in ("theirs", "ours"):
        again, _ = retentive.load(folder)
        assert all(map(torch.equal, again.parameters(), model.parameters()))
        main(["generate", folder, *greedy])
        assert capsys.readouterr().out == text
    main(["info", "theirs"])
    assert "theirs (torchscale layout)" in " ".join(capsys.readouterr().out.split())
    assert tokenizer.vocab_size == 257


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_quantised_folder_is_taken_like_any_other(to, place, capsys):
    main(["quantize", "run", "--to", to, "--out", f"new/{to}", "--text", "corpus", "--tokens", "300"])
    assert re.search(
        rf"^run -> new/{to}: {to}, [\d.]+ kB -> [\d.]+ kB, calibrated on 300 tokens$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    greedy = ["--prompt", "The ", "--max-tokens", "12", "--temperature", "0"]
    texts = {}
    for engine in ("native", "torch"):
        main(["generate", f"new/{to}", *greedy, "--engine", engine, "--dtype", "float32"])
        texts[engine] = capsys.readouterr().out
    assert texts["native"] == texts["torch"] and texts["native"].startswith("The ")
    main(["info", f"new/{to}"])
    assert f"weights of {to[3:]} bits, a scale for each" in capsys.readouterr().out
    main(["memory", "write", f"new/{to}", "corpus", "--out", "new/mine.mem"])
    main(["memory", "ask", f"new/{to}", "--memory", "new/mine.mem", "--prompt", "The ", "--max-tokens", "3"])
    assert "The " in capsys.readouterr().out


def test_weights_are_quantised_while_loading(place, capsys):
    greedy = ["--prompt", "The ", "--max-tokens", "12", "--temperature", "0"]
    main(["quantize", "run", "--to", "int8", "--out", "new"])
    capsys.readouterr()
    main(["generate", "new", *greedy])
    want = capsys.readouterr().out
    main(["generate", "run", *greedy, "--weights", "int8"])
    assert capsys.readouterr().out == want


def test_info_of_the_machine_says_what_models_are_run_by(capsys):
    main(["info", "--machine"])
    shown = capsys.readouterr().out
    assert f"torch {torch.__version__}" in " ".join(shown.split())
    assert native.describe() in " ".join(shown.split())


def test_generate_is_the_librarys(place, capsys):
    model, tokenizer = retentive.load("run")
    ids = [tokenizer.eos_id, *b"The "]
    params = SamplingParams(temperature=0.9, top_k=40, seed=3)
    made = list(generated(model, ids, params, max_tokens=21, stop_ids=[256]))
    options = ["--max-tokens", "21", "--temperature", "0.9", "--top-k", "40", "--top-p", "1", "--seed", "3"]
    main(["generate", "run", "--prompt", "The ", *options])
    assert capsys.readouterr().out == "The " + tokenizer.decode([t.id for t in made]) + "\n"


@pytest.mark.parametrize("options", [["--lookup"], ["--draft", "run"], ["--beams", "1"]], ids=lambda o: o[0])
def test_generate_finds_greedy_tokens_in_other_ways(options, place, capsys):
    greedy = [] if options[0] == "--beams" else ["--temperature", "0"]
    main(["generate", "run", "--prompt", "The ca", "--max-tokens", "40", "--temperature", "0"])
    want = capsys.readouterr().out
    main(["generate", "run", "--prompt", "The ca", "--max-tokens", "40", *greedy, *options])
    assert capsys.readouterr().out == want


def test_generate_reads_standard_input_and_stops_where_told(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", open("corpus/0.txt", encoding="utf-8"))  # noqa: SIM115 (closed below)
    with sys.stdin:
        main(["generate", "run", "--prompt", "-", "--max-tokens", "5", "--seed", "1"])
    text = capsys.readouterr().out
    assert text.startswith(Path("corpus/0.txt").read_text(encoding="utf-8"))
    again = ["generate", "run", "--prompt", "The ", "--max-tokens", "30", "--seed", "2"]
    main(again)
    whole = capsys.readouterr().out
    stop = whole[12:14]
    main([*again, "--stop", stop, "never there"])
    assert capsys.readouterr().out == whole[: whole.index(stop, 4)] + "\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_in_a_dtype(dtype, place, capsys):
    main(["generate", "run", "--max-tokens", "3", "--dtype", dtype])
    assert capsys.readouterr().out


def test_a_recipe_may_be_named_with_an_equals_sign(place):
    Path("recipe.py").write_text(
        "from pathlib import Path\n"
        "from retentive.train import TrainRun\n"
        "def recipe():\n"
        "    return TrainRun(data=Path('data'), out=Path('new'), batch=3)\n",
        encoding="utf-8",
    )
    command, rest = training.read_recipe(["--recipe=recipe.py", "--steps", "1"], TrainRun)
    assert command.batch == 3 and rest == ["--steps", "1"]
    assert training.read_recipe(["--steps", "1", "--recipe", "recipe.py"], TrainRun) == (command, rest)


def test_a_recipe_gives_the_options_and_flags_change_them(place):
    Path("recipe.py").write_text(
        "from pathlib import Path\n"
        "from retentive.train import TrainConfig, TrainRun\n"
        "def recipe():\n"
        "    options = TrainConfig(steps=2, warmup=1, lr=0.25, precision='fp32', device='cpu', sample_every=0)\n"
        "    return TrainRun(data=Path('data'), out=Path('new'), size='1m', batch=2, length=32,\n"
        "        set=dict(dim=32, layers=1, heads=2), train=options)\n",
        encoding="utf-8",
    )
    main(["train", "--recipe", "recipe.py"])
    main(["train", "--recipe", "recipe.py", "--out", "other", "--steps", "3", "--set", "dim=16", "layers=1", "heads=2"])
    first, second = (json.loads(Path(f"{name}/train.json").read_text(encoding="utf-8")) for name in ("new", "other"))
    assert (first["train"]["steps"], second["train"]["steps"]) == (2, 3)
    assert first["train"]["lr"] == second["train"]["lr"] == 0.25
    assert [retentive.load(name)[0].config.dim for name in ("new", "other")] == [32, 16]


def test_fla_gets_and_gives_back_what_it_can_express(place, train):
    widths = ["value_dim=32", "ffn_dim=32", "dim=32", "layers=1", "heads=2"]
    main(train("new", "--model", "fla", "--set", *widths))
    main(["convert", "new", "theirs", "--to", "fla"])
    assert json.loads(Path("theirs/config.json").read_text(encoding="utf-8"))["model_type"] == "retnet"
    main(["convert", "theirs", "back"])
    ids = torch.arange(20)[None]
    logits, again = (retentive.load(name)[0](ids)[0] for name in ("new", "back"))
    assert torch.equal(logits, again)


def test_a_loss_that_is_no_number_is_told_of_with_the_checkpoint_that_is_good(place, train, capsys):
    with pytest.raises(SystemExit) as stop:
        main(train("new", "--steps", "40", "--lr", "1e6", "--clip", "0", "--save-every", "1"))
    assert stop.value.code == 2
    assert "the last good checkpoint is new/checkpoints/step-" in capsys.readouterr().err.splitlines()[-1]
    assert all(p.isfinite().all() for p in retentive.load("new")[0].parameters())


def test_skipped_documents_are_told_of(place, capsys):
    Path("corpus/latin.txt").write_bytes("café".encode("latin-1"))
    main(["data", "corpus", "--out", "new", "--tokenizer", "bytes", "--on-bad-text", "skip"])
    assert "skipped 1 document (not UTF-8 text), the first is corpus/latin.txt" in capsys.readouterr().out
    assert sum(split["documents"] for split in json.loads(Path("new/meta.json").read_text())["splits"].values()) == 6


SETS = {
    "ints": (["dim=64", "heads=4", "layers=1"], dict(dim=64, heads=4, layers=1)),
    "floats": (["dropout=0.25", "norm_eps=1e-5"], dict(dropout=0.25, norm_eps=1e-5)),
    "flags": (["gate=false", "tie_embeddings=false"], dict(gate=False, tie_embeddings=False)),
    "names": (["decay=none", "rotary=half", "activation=gelu"], dict(decay="none", rotary="half", activation="gelu")),
    "own-decays": (["decay=[-0.5,-0.1]", "heads=2"], dict(decay=(-0.5, -0.1), heads=2)),
}


@pytest.mark.parametrize("name", SETS)
def test_set_changes_the_config(name):
    given, want = SETS[name]
    config = TrainRun(Path("d"), Path("o"), size="1m", set=training.read_changes(given)).config(99)
    found = flat(config, "a test")
    assert {key: found[key] for key in want} == want
    assert config.vocab_size == 99 and config.kinds[0] == "retention"


def test_the_twin_is_that_of_the_changed_retnet():
    run = TrainRun(Path("d"), Path("o"), size="1m", set={"dim": 64}, model="transformer")
    assert run.config(99) == retentive.models.twin(replace(run, model="retnet").config(99))


def test_training_a_twin_and_telling_of_it(place, train, capsys):
    main(train("twin", "--model", "transformer"))
    main(["info", "twin"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Transformer, twin (retentive layout)" in shown and "KV cache" in shown and "state" not in shown


@pytest.mark.parametrize("size", ["5m", "paper-1.3b"])
def test_info_of_a_size(size, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["info", size, "--vocab-size", "1000"])
    config = retentive.models.retnet(size, vocab_size=1000)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{cost.parameters(config):,} parameters" in shown
    assert f"backend of retention on this machine's CPU: {backends.describe()}" in shown


def test_info_tells_before_training_what_llama_cpp_would_run(capsys):
    main(["info", "retnet-portable", "--size", "1m", "--to", "gguf"])
    assert "llama.cpp runs it as arwkv7" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["5m", "hybrid", "transformer"])
def test_info_writes_its_numbers(name, tmp_path):
    main(["info", name, "--vocab-size", "1000", "--json", str(tmp_path / "info.json")])
    found = json.loads((tmp_path / "info.json").read_text())
    config = ModelConfig.read(found["config"])
    assert found["parameters"] == cost.parameters(config) and found["model"] == config.name
    assert found["memory_bytes"]["8192"] == cost.memory_bytes(config, 8192, bytes_per_value=2)
    assert found["kv_cache_bytes_per_token"] == cost.attention_cache_bytes(config)
    assert found["break_even"] == cost.break_even(config)


def test_info_lists_the_sizes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["info", "--sizes"])
    shown = capsys.readouterr().out
    assert all(re.search(rf"\b{re.escape(name)}\b", shown) for name in PRESETS)


def test_info_of_a_run_that_is_being_written(place, capsys):
    """Its newest line may not be whole yet."""
    with open("run/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    main(["info", "run"])
    assert "trained 4 steps" in " ".join(capsys.readouterr().out.split())


def test_resuming_repeats_and_frees(place, train):
    """The same command goes on, here from a run cut short; what alters nothing that is computed may change."""
    lines = Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for file in Path("run/checkpoints/step-00000004").iterdir():
        file.unlink()
    main([*train("run", "--resume"), "--keep", "1"])
    again = Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    loss = [[json.loads(line)["loss"] for line in text if '"loss"' in line] for text in (lines, again)]
    assert loss[0] == loss[1] and len(loss[0]) == 4
    assert json.loads(Path("run/train.json").read_text(encoding="utf-8"))["train"]["keep"] == 1
    assert [f.name for f in Path("run/checkpoints").iterdir()] == ["step-00000004"]


def test_a_run_goes_on_where_its_data_were_moved(place, train):
    Path("data").rename("elsewhere")
    main([("elsewhere" if a == "data" else a) for a in train("run", "--resume")])
    assert json.loads(Path("run/train.json").read_text(encoding="utf-8"))["command"]["data"] == "elsewhere"


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param("bench train --lengths 16 --tokens 32 --repeats 1", marks=pytest.mark.slow),
        "bench decode --contexts 8 16 --models retnet",
    ],
)
def test_bench_writes_what_it_measured(argv, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("retentive.machine.gemm_rate", lambda *_, **__: 1e12)
    monkeypatch.setattr("retentive.machine.read_rate", lambda *_: 1e10)
    monkeypatch.setattr("retentive.machine.numbers", lambda device, *_: torch.ones(64, 4096, device=device))
    monkeypatch.setitem(PRESETS, "1m", Size(dict(dim=16, layers=1, heads=2)))
    out = tmp_path / "results" / "bench.json"
    main([*argv.split(), "--size", "1m", "--vocab-size", "31", "--json", str(out)])
    assert capsys.readouterr().out.startswith("|")
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["size"] == "1m" and result["hardware"]["torch"] == torch.__version__
    assert out.with_suffix(".png").exists()


@pytest.mark.parametrize("argv", [["--help"], ["bench"], ["info", "--sizes"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(argv, tmp_path):
    """As `retentive info --sizes | head -1` does."""
    command = [sys.executable, "-m", "retentive", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, b"")
