"""`retentive.history`: a run's curve as rows, whether it has ended, is training or was killed."""

import pytest

import retentive

FEW = dict(size="1m", set={"dim": 16, "layers": 1, "heads": 2}, batch=2, length=32, precision="fp32", device="cpu")
STEP = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory"}
EVALUATION = {"step", "tokens", "held_out_loss", "bytes"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for n in range(4):
        (tmp_path / "texts" / f"{n}.txt").write_text("Once upon a time a fox lived in a wood.\n" * 100)
    return tmp_path


def test_a_row_for_each_step_and_evaluation(place):
    run = retentive.train("texts", "run", steps=4, accumulate=3, eval_every=2, sample_every=2, **FEW)
    rows = retentive.history(run)
    steps, evaluations = ([row for row in rows if ("loss" in row) is wanted] for wanted in (True, False))
    assert [set(row) for row in steps] == [STEP] * 4
    assert [(row["step"], row["tokens"]) for row in steps] == [(n, n * 2 * 32 * 3) for n in (1, 2, 3, 4)]
    bits = ["bits_per_byte", "bits_per_byte", "final_bits_per_byte"]
    assert [set(row) for row in evaluations] == [EVALUATION | {name} for name in bits]
    assert [row["step"] for row in evaluations] == [2, 4, 4]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def test_a_run_is_read_while_it_trains_and_after_it_was_killed(place):
    seen = []

    def look(training, metrics):
        losses = [row["loss"] for row in retentive.history(training.run) if "loss" in row]
        seen.append(len(losses) == training.step and losses[-1] == metrics["loss"])

    run = retentive.train("texts", "run", steps=3, eval_every=0, sample_every=0, callbacks=[look], **FEW)
    assert seen == [True] * 3
    whole = retentive.history(str(run))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert retentive.history(run) == whole


def test_pandas_makes_a_table_of_it(place):
    pandas = pytest.importorskip("pandas", reason="tables are read by pip install pandas")
    run = retentive.train("texts", "run", steps=3, eval_every=1, sample_every=0, **FEW)
    table = pandas.DataFrame(retentive.history(run))
    assert (
        list(table.dropna(subset="loss").tokens) == list(table.dropna(subset="bits_per_byte").tokens) == [64, 128, 192]
    )


def test_a_loop_without_a_run_has_no_tokens(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 1, "sample": "a"}\n')
    assert retentive.history(tmp_path) == [{"step": 1, "loss": 2.5}]


def test_a_folder_that_is_no_run(tmp_path, refuses):
    with refuses(f"{tmp_path} is no run of `retentive train`", FileNotFoundError):
        retentive.history(tmp_path)
