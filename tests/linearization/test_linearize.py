"""`retentive linearize`: its stages, what they write, that they go on to the bit, and what they refuse."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import retentive
from retentive.checkpoint import ModelFolder, save_model
from retentive.cli import main
from retentive.data.tokenizer import ByteTokenizer
from retentive.files import only_writer
from retentive.linearization import LinearizeRun
from retentive.models import build, transformer
from retentive.models.students import student
from retentive.train import TrainRun, checkpoints

TEACHER = transformer(vocab_size=257, dim=32, layers=2, heads=4, kv_heads=2, tie_embeddings=True)
BRIEF = ["--batch", "2", "--length", "48", "--precision", "fp32", "--device", "cpu", "--warmup", "2", "--window", "8"]
BRIEF += ["--sinks", "2", "--save-every", "2", "--eval-tokens", "200", "--mixers", "600", "--predictions", "600"]
BRIEF += ["--tokens", "600", "--lr-new", "1e-2"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The working directory: a teacher, and two texts."""
    monkeypatch.chdir(tmp_path)
    for room in ("train.speed", "linearization.run"):
        monkeypatch.setattr(f"retentive.{room}.gemm_rate", lambda device, dtype, **how: 1e12)
    monkeypatch.setattr("retentive.linearization.run.MEASURED", 400)  # tokens: batches of two short rows are slow
    torch.manual_seed(1)
    model = build(TEACHER)
    for p in model.parameters():  # its predictions depend on what is far away
        torch.nn.init.normal_(p, std=1.5 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    save_model("teacher", model, ByteTokenizer())
    Path("texts").mkdir()
    for n in range(8):
        text = "".join(f"The café number {n} has {m} chairs and a view of the river.\n" for m in range(12))
        Path("texts", f"{n}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def linearize(*more: str) -> None:
    main(["linearize", "teacher", "--data", "texts", "--out", "mine", *BRIEF, *more])


def records(run: str, key: str) -> list:
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    return [line[key] for line in map(json.loads, lines) if key in line]


def test_stages_lead_from_the_teacher_in_a_window_to_a_model_that_is_closer_to_it(place, capsys):
    linearize()
    said = capsys.readouterr().err
    assert (
        "warning: equally likely tokens would have a loss of 5.5491, the teacher is no better" in said
    )  # it is random
    assert "teacher: held-out loss" in said and "student before training: held-out loss" in said
    assert "mine-mixers: trains retention on outputs of the teacher's mixers" in said and "| mean |" in said
    measured = json.loads(Path("mine-student", "measured.json").read_text())
    first = records("mine-mixers", "loss")
    assert len(first) == 600 // (2 * 48)
    table = Path("mine-mixers", "layers.md").read_text().splitlines()[-1]
    before, after = map(float, table.replace("|", " ").split()[1:])
    assert after < before
    kl = records("mine-predictions", "loss") + records("mine", "loss")
    assert len(kl) == 2 * len(first) and sum(kl[-3:]) < sum(kl[:3])
    assert measured["teacher"] > 0 and records("mine", "held_out_loss")
    assert Path("mine/loss.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = retentive.load("mine")
    windows = [int(line.split("|")[2]) for line in Path("mine-student", "windows.md").read_text().splitlines()[2:]]
    assert sum(windows) <= 2 * 8 and model.config.constant_state
    assert model.config == student(TEACHER, window=windows, sinks=2)
    assert tokenizer.encode("a") == ByteTokenizer().encode("a")
    before, after = (load_file(f"mine{end}/model.safetensors") for end in ("-student", "-predictions"))
    changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert changed and all("retention" in name for name in changed)
    assert any("ffn" in n for n, x in load_file("mine/model.safetensors").items() if not torch.equal(x, after[n]))


def test_a_stage_that_was_stopped_goes_on_to_the_bit(place, monkeypatch):
    """A signal comes while the checkpoint number `save` is made; each stage makes three."""
    runs = ("mine-mixers", "mine-predictions", "mine")
    linearize()
    whole, losses = load_file("mine/model.safetensors"), [records(run, "loss") for run in runs]
    real = checkpoints.contents
    for stage, save in (("mine-mixers", 2), ("mine", 8)):
        saves = []
        for end in ("", "-student", "-mixers", "-predictions", "-data"):
            shutil.rmtree(f"mine{end}")

        def told(training, saves=saves, save=save):
            saves.append(training.step)
            if len(saves) == save:
                signal.raise_signal(signal.SIGTERM)
            return real(training)

        monkeypatch.setattr(checkpoints, "contents", told)
        linearize()
        assert len(records(stage, "loss")) == 5 and (stage == "mine") == Path("mine").exists()
        main(["linearize", "teacher", "--data", "texts", "--out", "mine", "--resume"])  # with its own options
        assert [records(run, "loss") for run in runs] == losses
        again = load_file("mine/model.safetensors")
        assert all(torch.equal(x, again[name]) for name, x in whole.items())


def test_stages_can_be_left_out_and_layers_keep_their_attention(place):
    left_out = ["--mixers", "0", "--predictions", "0", "--overwrite"]
    linearize(*left_out, "--attention", "1", "--window", "0")
    assert not Path("mine-mixers").exists() and not Path("mine-predictions").exists()
    kinds = ModelFolder.open("mine").config.kinds
    assert sorted(kinds) == ["attention", "retention"]
    linearize(*left_out, "--attention", "1", "--window", "8")
    assert sorted(ModelFolder.open("mine").config.kinds) == ["attention", "attention", "retention"]
    assert "| all |" in Path("mine-student", "windows.md").read_text()


def test_each_layer_takes_the_window_that_it_is_given(place):
    linearize("--mixers", "0", "--predictions", "0", "--window", "5", "20")
    assert (
        ModelFolder.open("mine").config.windows == (5 + 2, 0, 20 + 2, 0)
        and not Path("mine-student", "windows.md").exists()
    )


def test_packed_data_is_taken_as_it_is(place):
    main(["data", "texts", "--out", "packed", "--tokenizer", "bytes"])
    how = dict(window=8, sinks=2, length=48, mixers=0, predictions=0, tokens=100, precision="fp32", warmup=1)
    retentive.linearize("teacher", "packed", "mine", **how)
    assert not Path("mine-data").exists() and len(records("mine", "loss")) == 2


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--window", "48"], "--length 48 is within the window of 48 and 2 sinks, beyond which retention is to learn"),
        (["--tokens", "0"], "--tokens must be at least 1, the tokens of the last stage, got 0"),
        (["--window", "-1"], "--window -1: expected whole numbers from 0"),
        (["--window", "8", "9", "9"], "3 windows for a teacher of 2 layers"),
        (["--attention", "3"], "--attention 3: the teacher has 2 layers"),
        (["--attention", "0", "5"], "attention in layer 5: the teacher has layers 0 to 1"),
        (["--attention", "0", "1"], "--attention 0 1: with attention in all layers nothing is to learn"),
        (["--attention", "2"], "--attention 2: with attention in all layers nothing is to learn"),
        (["--window"], "--window"),
        (["--window", "8", "0"], "--window 8 0: each layer needs at least 1 token"),
        (["--batch", "0"], "--batch 0: expected whole numbers from 1"),
        (["--lr-new", "-1"], "--lr-new -1.0: must be above 0"),
        (["--mode", "carry"], "--mode carry hands states on from row to row"),
        (["--data-weights", "1", "2"], "there is data in 1 folder (texts are packed into one)"),
        (["--data", "other"], "other was packed with another tokenizer than that of teacher: pack it again"),
        (["--from-teacher", "-5"], "--from-teacher -5: expected whole numbers from 0"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "texts", "packed"], "packed is packed, others are texts: pack all of them, or none"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(argv, error, place, capsys):
    main(["data", "texts", "--out", "packed", "--tokenizer", "bytes"])
    main(["data", "texts", "--out", "other", "--vocab-size", "300"])
    before = {path.name for path in Path().iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        linearize(*argv)
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and error in said[-1], said
    assert {path.name for path in Path().iterdir()} == before


def test_unknown_keywords_are_refused(place):
    with pytest.raises(TypeError, match="linearize has no option 'windows': did you mean window"):
        retentive.linearize("teacher", "texts", "mine", windows=8)


def test_another_run_is_not_overwritten_unless_asked(place, capsys):
    linearize("--mixers", "0", "--predictions", "0")
    first = records("mine", "loss")
    for argv in ([], ["--window", "9"]):
        with pytest.raises(SystemExit):
            linearize(*argv)
        assert "already holds a run: --resume goes on with it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        linearize("--resume", "--window", "9")
    assert "--window 9 contradicts --window 8 of the run at mine-student" in capsys.readouterr().err
    linearize("--mixers", "0", "--predictions", "0", "--window", "9", "11", "--overwrite")
    assert records("mine", "loss") != first and ModelFolder.open("mine").config.windows == (9 + 2, 0, 11 + 2, 0)


def test_a_teacher_of_retention_is_refused(place, capsys):
    main(["convert", "teacher", "other"])
    with pytest.raises(SystemExit):
        main(["linearize", "novels", "--data", "texts", "--out", "mine", *BRIEF])
    assert "a student needs a teacher of attention alone, this is a RetNet" in capsys.readouterr().err
    assert not list(Path().glob("mine*"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(teacher="teacher", mode="carry"), "`teacher` reads every row from its beginning"),
        (dict(learns="mixers"), "`learns` is of a teacher: name one"),
        (dict(only=("nothing",)), "no weight has this in its name"),
        (dict(teacher="novels"), "novels has another tokenizer than packed"),
    ],
)
def test_training_from_a_teacher_refuses(options, error, place):
    main(["data", "texts", "--out", "packed", "--tokenizer", "bytes"])
    with pytest.raises(ValueError, match=error):
        TrainRun.of("packed", "run", steps=1, size="1m", length=16, **options).run(quiet=True)
    assert not Path("run").exists()


@pytest.mark.slow
def test_a_run_that_begins_anew_leaves_nothing_of_the_earlier_one(place, monkeypatch):
    """It is stopped in its first stage: the later stages of the earlier run must not be taken for its own."""
    linearize()
    real = checkpoints.contents

    def interrupted(training):
        signal.raise_signal(signal.SIGINT)
        return real(training)

    monkeypatch.setattr(checkpoints, "contents", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        linearize("--overwrite", "--window", "9")
    monkeypatch.setattr(checkpoints, "contents", real)
    assert not Path("mine/model.safetensors").exists() and not Path("mine-predictions/model.safetensors").exists()
    linearize("--resume", "--window", "9")
    assert sum(ModelFolder.open("mine").config.windows) <= 2 * (9 + 2)


def test_folders_of_others_are_left_alone(place, capsys):
    for name, argv in (("mine-data", ()), ("mine-student", ("--resume",)), ("mine-chats", ("--overwrite",))):
        Path(name).mkdir()
        Path(name, "own.txt").write_text("kept")
        with pytest.raises(SystemExit):
            linearize(*argv)
        assert f"{name} is there, and not of such a run: choose another --out" in capsys.readouterr().err
        assert [path.name for path in Path(name).iterdir()] == ["own.txt"]
        Path(name, "own.txt").unlink()
        Path(name).rmdir()


def test_a_teacher_is_not_overwritten(place, capsys):
    linearize("--mixers", "0", "--predictions", "0")
    before = Path("mine-student/model.safetensors").read_bytes()
    for name in ("mine-student", "mine"):
        with pytest.raises(SystemExit):
            main(["linearize", name, "--data", "texts", "--out", "mine", *BRIEF, "--overwrite"])
        assert f"{name} is the teacher, and this run would replace it" in capsys.readouterr().err
    assert Path("mine-student/model.safetensors").read_bytes() == before


def test_a_second_process_changes_nothing(place, capsys):
    linearize("--mixers", "0", "--predictions", "0")
    before = {path: path.read_bytes() for path in Path().glob("mine*/*") if path.is_file()}
    with only_writer(Path("mine-student")), pytest.raises(SystemExit):
        linearize("--overwrite", "--window", "9")
    assert "mine-student is being written by another process" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_a_failed_beginning_leaves_no_data_behind(place):
    with pytest.raises(SystemExit):
        linearize("--device", "nowhere")
    assert not list(Path().glob("*mine*"))


def test_a_resumed_run_keeps_its_data_and_its_teacher(place, capsys):
    linearize("--mixers", "0", "--predictions", "0")
    Path("texts2").mkdir()
    for argv in (["teacher", "--data", "texts2"], ["teacher", "--data", "texts", "--from-teacher", "300"]):
        with pytest.raises(SystemExit):
            main(["linearize", *argv, "--out", "mine", "--resume"])
        assert "of the run at mine-student: leave it out" in capsys.readouterr().err


def test_damaged_teachers_are_named(place, refuses):
    model = build(TEACHER)
    with torch.no_grad():
        model.embed.weight[5] = torch.nan
    save_model("damaged", model, ByteTokenizer())
    save_model("silent", build(TEACHER))
    how = dict(window=8, sinks=2, length=48, precision="fp32")
    with refuses("the teacher's predictions are not finite numbers: its weights are damaged"):
        retentive.linearize("damaged", "texts", "mine", **how)
    with refuses("silent has no tokenizer, with which texts are read"):
        retentive.linearize("silent", "texts", "mine", **how)
    for window in ([], [8, "a"], 8.0, "8", None):
        with refuses("expected whole numbers from 0"):
            retentive.linearize("teacher", "texts", "mine", **how | {"window": window})
    assert not list(Path().glob("*mine*"))


def test_a_student_is_described(place, capsys):
    linearize("--mixers", "0", "--predictions", "0", "--window", "8", "9")
    capsys.readouterr()
    main(["info", "mine"])
    assert "feed-forward: none" in capsys.readouterr().out


def test_rounding_and_the_choice_of_weights_are_of_the_last_stage(tmp_path):
    run = LinearizeRun.of(
        "teacher", "data", tmp_path / "out", qat="int4", only=("retention", "embed"), lr=2e-4, mixers=2048
    )
    stages = run.stages(tmp_path, (tmp_path / "data",))
    assert [stage.train.qat for stage in stages] == ["none", "none", "int4"]
    assert [stage.only for stage in stages] == [("retention",), ("retention",), ("retention", "embed")]
    assert [stage.train.lr for stage in stages] == [1e-3, 1e-3, 2e-4]
