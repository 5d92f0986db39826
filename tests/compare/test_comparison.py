"""The plan of a comparison: every run once, checked before any begins, and the same after a trip through JSON."""

import math
from dataclasses import replace

import pytest

from retentive.compare import Comparison, table
from retentive.compare.records import RECORD
from retentive.data.pack import pack
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer
from retentive.files import write_json
from retentive.train import TrainConfig
from tests.compare.made_up import record


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "data"
    text = [Document("a", "a text of some length, " * 20)]
    pack(folder, ByteTokenizer(), text, text)
    return folder


@pytest.fixture
def comparison(packed, tmp_path) -> Comparison:
    return Comparison(data=packed, out=tmp_path / "out", length=16)


def test_a_plan_is_every_run_once_a_seed_after_the_other(comparison):
    wide = replace(comparison, variants=("retnet", "gated"), sizes=("1m", "5m"), seeds=(0, 7), lrs=(1e-3, 2e-3))
    runs = wide.plan()
    assert len(runs) == len({run.name for run in runs}) == 16
    assert [run.seed for run in runs] == [0] * 8 + [7] * 8


@pytest.fixture
def train(monkeypatch):
    """`train(bits)`: workers leave the bits per byte that `bits(run)` gives, or "failed" for None. Returns what ran."""

    def put(bits):
        ran = []

        def work(tasks, **how):
            for task in tasks:
                if not task.done:
                    ran.append(task.run)
                    value, made = bits(task.run), record(task.run.variant, 0.0, seed=task.run.seed, lr=task.run.lr)
                    made |= {"name": task.run.name, "about": task.about}
                    task.folder.mkdir(parents=True)
                    write_json(
                        task.folder / RECORD, made | ({"failed": "nan"} if value is None else {"bits_per_byte": value})
                    )

        monkeypatch.setattr("retentive.compare.comparison.work", work)
        monkeypatch.setattr(Comparison, "estimate", lambda self, runs, threads: iter([f"{len(runs)} runs"]))
        return ran

    return put


def test_with_tune_the_first_seed_finds_the_rate_of_the_others(comparison, train, tmp_path):
    tuned = replace(comparison, variants=("retnet", "gated"), seeds=(3, 0, 7), lrs=(1e-3, 2e-3, 4e-3), tune=True)
    assert [(run.seed, run.lr) for run in tuned.plan()[-4:]] == [(0, None), (0, None), (7, None), (7, None)]
    best = {"retnet": 4e-3, "gated": 2e-3}
    ran, said = train(lambda run: 2 + run.seed + abs(run.lr - best[run.variant])), []
    result = tuned.run(said.append)
    assert said == ["10 runs"] and result["planned"] == len(ran) == 10
    assert {(run.variant, run.lr) for run in ran[6:]} == set(best.items()) and {run.seed for run in ran[6:]} == {0, 7}
    chosen = {row["variant"]: row["lr"] for row in result["rows"] if row["best_rate"]}
    assert chosen == best, "told by the first seed, though the others are worse"
    tuned.run(said.append)
    assert said[1:] == ["0 runs"] and len(ran) == 10
    write_json(tmp_path / "result.json", result)
    again = replace(tuned, out=tmp_path / "again", earlier=(tmp_path / "result.json",))
    assert again.run(said.append)["rows"] == result["rows"] and len(ran) == 10
    assert said[-2:] == [f"{tmp_path / 'result.json'}: 10 of its 10 runs have names of this comparison", "0 runs"]


def test_every_variant_is_trained_with_every_optimiser_at_its_own_best_rate(comparison, train):
    both = replace(comparison, variants=("retnet", "gated"), optimizers=("adamw", "muon"), lrs=(1e-3, 2e-3), seeds=(0,))
    names = ["retnet", "retnet+muon", "gated", "gated+muon"]
    assert [run.variant for run in both.plan()] == names * 2
    made = [both.train_run(run) for run in both.plan()[:4]]
    assert [run.train.optimizer for run in made] == ["adamw", "muon"] * 2
    assert made[1] == replace(made[0], out=made[1].out, train=replace(made[0].train, optimizer="muon"))
    best = {"retnet": 1e-3, "retnet+muon": 2e-3, "gated": 1e-3, "gated+muon": 2e-3}
    train(lambda run: 2 + abs(run.lr - best[run.variant]))
    result = both.run()
    assert {row["variant"]: row["lr"] for row in result["rows"] if row["best_rate"]} == best
    assert result["baseline"] == "retnet" and "+: trained with the named optimiser" in table(result)
    muon = replace(both, train=replace(both.train, optimizer="muon"))
    assert muon.names == ("retnet+adamw", "retnet", "gated+adamw", "gated")
    assert muon.train_run(muon.plan()[0]).train.optimizer == "adamw"
    alone = replace(both, optimizers=("muon",))
    assert alone.names == ("retnet+muon", "gated+muon")
    own = replace(both, set={"calm": {"decay_scale": 32.0}})
    assert own.names[-2:] == ("calm", "calm+muon") and own.train_run(own.plan()[5]).set["decay_scale"] == 32.0


def test_with_tune_what_diverged_at_all_rates_is_not_tried_again(comparison, train):
    ran = train(lambda run: None if run.variant == "gated" else 2.0)
    tuned = replace(comparison, variants=("retnet", "gated"), seeds=(0, 1), lrs=(1e-3, 2e-3), tune=True)
    result = tuned.run()
    assert [run.variant for run in ran] == ["retnet", "gated"] * 2 + ["retnet"] and result["planned"] == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(variants=("retnet", "gpt")), "unknown variant 'gpt', expected one of retnet"),
        (dict(variants=("retnett",)), "unknown variant 'retnett': did you mean retnet?"),
        (dict(variants=()), "no variant given"),
        (dict(seeds=()), "`seeds` is empty: nothing to compare"),
        (dict(sizes=("1m", "1m")), "`sizes=('1m', '1m')`: a value is given twice"),
        (dict(sizes=("9z",)), "unknown size '9z'"),
        (dict(variants=("retnet", "retnet")), "`variants=('retnet', 'retnet')`: a value is given twice"),
        (dict(optimizers=("muon", "muon")), "`optimizers=('muon', 'muon')`: a value is given twice"),
        (dict(lrs=(1e-3, 0.0)), "`lrs=0.0`: expected a number above 0"),
        (dict(lrs=(math.nan, 1e-3)), "`lrs=nan`: expected a number above 0"),
        (dict(set={"big": {"ffn_dim": 4096}}), "ffn_dim: set by the comparison for equal parameters"),
        (dict(optimizers=("muon",), variants=("retnet", "mamba")), "mamba+muon: muon is for whole matrices"),
        (dict(jobs=0), "`jobs=0`: must be at least 1"),
        (dict(length=100_000), "too little held-out text for windows of 100000 tokens"),
        (dict(train=TrainConfig(seed=7)), "`seed=7`: a comparison has several; name them in `seeds`"),
    ],
)
def test_plans_that_make_no_sense_are_refused_before_anything_is_written(changes, words, comparison, refuses):
    with refuses(words):
        replace(comparison, **changes).run()
    assert not comparison.out.exists()


def test_a_file_in_place_of_the_folder_is_refused_before_anything_is_measured(comparison, refuses):
    comparison.out.touch()
    with refuses("out is a file: choose a folder for the runs", FileExistsError):
        comparison.run(say=lambda line: pytest.fail(line))


def test_a_folder_of_other_things_is_refused_and_one_of_runs_is_not(comparison, refuses):
    comparison.out.mkdir()
    (comparison.out / ".precision").touch()
    comparison.check()
    (comparison.out / "0.txt").touch()
    with refuses("out holds other things (0.txt): choose a new or an empty folder", FileExistsError):
        comparison.check()
    (comparison.out / comparison.plan()[-1].name).mkdir()  # a run that was killed as it began
    comparison.check()
    (comparison.out / comparison.plan()[-1].name).rename(comparison.out / "another")
    (comparison.out / "another" / "train.json").touch()
    comparison.check()


def test_a_missing_library_is_told_before_anything_is_trained(comparison, monkeypatch, refuses):
    monkeypatch.setattr("retentive.compare.comparison.find_spec", lambda name: None)
    with refuses("pip install 'retentive[peers]'", ModuleNotFoundError):
        replace(comparison, variants=("retnet", "llama")).run()


def test_a_worker_is_told_the_whole_comparison(comparison):
    told = replace(
        comparison,
        lrs=(1e-3,),
        seeds=(3,),
        optimizers=("adamw", "muon"),
        train=TrainConfig(steps=7, clip=0.5),
        mixed=True,
    )
    assert Comparison.from_description(told.described()) == told


def test_what_precision_auto_means_is_decided_once(comparison, monkeypatch):
    """Measured by each run on a machine that is busy now and then, two variants could train in different ones."""
    found = iter(["bf16", "fp32"])
    monkeypatch.setattr("retentive.compare.comparison.pick_precision", lambda *_: next(found))
    assert [comparison.precision(), comparison.precision()] == ["bf16", "bf16"]
    fixed = replace(comparison, out=comparison.out / "other", train=TrainConfig(precision="fp32"))
    assert fixed.precision() == "fp32" and not fixed.out.exists()


def test_a_run_is_what_train_would_do_at_its_rate_and_seed(comparison):
    run = replace(comparison, variants=("gated",), seeds=(5,), lrs=(3e-3,)).plan()[0]
    made = comparison.train_run(run)
    assert (made.train.lr, made.train.seed, made.resume, made.out.name) == (3e-3, 5, True, "gated_1m_lr0.003_seed5")
    assert made.config(257).retention.decay == "gated" and made.set["score_norm"] is False
