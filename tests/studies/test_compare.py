"""Comparisons: the plan, variants of equal size, the numbers and their uncertainty by hand, what is refused."""

import json
import math

import numpy as np
import pytest

from retentive.models import HybridConfig, RetNetConfig, cost, preset, twin
from retentive.studies import compare
from retentive.studies.compare import VARIANTS

HARDWARE = {"cpu": "a", "threads": 1, "gpu": "none"}


def record(variant, bits, *, size="1m", seed=0, lr=1e-3, parameters=10**6, **more):
    part = {"tokens": 10, "loss": bits + 3}
    return {
        "variant": variant, "size": size, "seed": seed, "lr": lr, "name": f"{variant}{seed}",
        "parameters": parameters, "block_parameters": parameters, "tokens": 1000, "bits_per_byte": bits,
        "recalled": part, "others": part, "tokens_per_second": 100.0 + seed, "memory": 10**9,
        "curve": [[500, bits + 1], [1000, bits]], "hardware": HARDWARE, "about": {"train": {}}, **more,
    }  # fmt: skip


@pytest.mark.parametrize("size", ["1m", "5m", "60m"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v].model in ("retnet", "transformer", "hybrid")])
def test_variants_have_the_parameters_of_the_baseline(variant, size):
    config = preset(size, vocab_size=1000)
    changed = compare.config_of(variant, config)
    # the feed-forward width is whole: half a unit of it in each of three matrices and every block is what may be off
    unit = 3 * config.dim * config.layers
    assert abs(cost.block_parameters(changed) - cost.block_parameters(config)) <= unit / 2 + 2


def test_variants_are_what_they_say():
    config = RetNetConfig(vocab_size=100, dim=64, layers=8, heads=4)
    assert compare.changes("retnet", config) == {}
    assert compare.config_of("transformer", config) == twin(config)
    assert compare.config_of("no-gate", config).gate is False
    assert compare.config_of("one-decay", config).decay == (math.log(127 / 128),) * 4
    assert compare.config_of("no-decay", config).decay == "none"
    small = compare.config_of("small-heads", config)
    assert (small.heads, small.kv_heads, small.key_dim, small.value_dim) == (16, 16, 64, config.value_dim)
    hybrid = compare.config_of("hybrid", config)
    assert isinstance(hybrid, HybridConfig) and [hybrid.attends(i) for i in range(8)] == [False, False, False, True] * 2
    assert compare.config_of("gated", config).decay == "gated"
    assert compare.config_of("short-head", config).decay[0] == -1


def test_a_plan_is_every_run_once_a_seed_after_the_other():
    runs = compare.plan(["retnet", "gated"], ["1m", "5m"], [0, 7], [1e-3, 2e-3])
    assert len(runs) == len({run.name for run in runs}) == 16
    assert [run.seed for run in runs] == [0] * 8 + [7] * 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(variants=["retnet", "gpt"]), "unknown variant 'gpt', expected one of retnet"),
        (dict(variants=[]), "no variant given"),
        (dict(seeds=[]), "no seed given"),
        (dict(sizes=["1m", "1m"]), "a size is given twice"),
        (dict(variants=["retnet", "retnet"]), "a variant is given twice"),
    ],
)
def test_plans_that_make_no_sense(changes, words, refuses):
    with refuses(words):
        compare.plan(**{"variants": ["retnet"], "sizes": ["1m"], "seeds": [0], "lrs": [1e-3], **changes})


def test_means_differences_and_intervals_by_hand():
    found = [
        record("retnet", 2.0, seed=0), record("retnet", 2.2, seed=1),
        record("gated", 1.9, seed=0), record("gated", 2.14, seed=1),
    ]  # fmt: skip
    base, gated = compare.summary(found, "retnet")
    assert (base["bits_per_byte"], gated["bits_per_byte"]) == (pytest.approx(2.1), pytest.approx(2.02))
    # squares within cells: 2 * 0.1^2 and 2 * 0.12^2 over two degrees of freedom; t = 4.303
    deviation = math.sqrt((0.02 + 0.0288) / 2)
    assert gated["half_width"] == pytest.approx(4.303 * deviation / math.sqrt(2))
    # seed by seed -0.10 and -0.06: their deviation has one degree of freedom; t = 12.706
    assert gated["difference"] == pytest.approx(-0.08)
    assert gated["difference_half_width"] == pytest.approx(12.706 * math.sqrt(0.0008) / math.sqrt(2))
    assert "difference" not in base and gated["recalled"] == pytest.approx(5.02)
    assert gated["tokens_per_second"] == 100.5 and gated["seeds"] == [0, 1]


def test_one_seed_has_no_interval():
    (row, other) = compare.summary([record("retnet", 2.0), record("gated", 1.9)], "retnet")
    assert row["half_width"] is None and other["difference_half_width"] is None
    assert "–" in compare.table(compare.report([record("retnet", 2.0), record("gated", 1.9)], "retnet"))


def test_intervals_hold_what_they_promise():
    """Of 2000 experiments of noise alone, 95 % have the truth within the interval of a mean of two."""
    random, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        noise = random.normal(size=(5, 2))
        deviation, freedom = compare.pooled(noise)
        inside += abs(noise[0].mean()) <= compare.half_width(deviation, freedom, 2)
    assert 0.93 < inside / 2000 < 0.97  # a binomial's deviation is 0.5 %


def test_a_law_is_found_again():
    sizes = {"1m": 1.0, "2m": 2.3, "5m": 4.9}
    found = [
        record("retnet", 1.8 * n**-0.07, size=size, seed=seed, parameters=int(n * 1e6))
        for size, n in sizes.items()
        for seed in (0, 1)
    ]
    law = compare.law(found, "retnet")
    assert law["a"] == pytest.approx(1.8, rel=1e-6) and law["b"] == pytest.approx(0.07, rel=1e-5)
    assert law["b_half_width"] < 1e-5 and law["runs"] == 6
    assert compare.law([r for r in found if r["size"] != "5m"], "retnet") is None


def test_each_variant_counts_at_its_best_rate():
    found = [record("retnet", 2.0, lr=1e-3), record("retnet", 1.8, lr=2e-3), record("gated", 1.9, lr=1e-3),
             record("gated", 2.5, lr=2e-3)]  # fmt: skip
    assert compare.best_rates(compare.summary(found, "retnet")) == {("1m", "retnet"): 2e-3, ("1m", "gated"): 1e-3}
    result = compare.report(found, "retnet")
    differences = {(row["variant"], row["lr"]): row.get("difference") for row in result["rows"]}
    assert differences.pop(("gated", 1e-3)) == pytest.approx(0.1) and set(differences.values()) == {None}
    table = compare.table(result)
    assert "| retnet, lr 0.002 * |" in table and "| retnet, lr 0.001 |" in table and "* The best rate of each" in table


def test_what_did_not_train_is_named_and_counts_for_nobody():
    found = [record("retnet", 2.0, lr=1e-3), record("retnet", 1.8, lr=2e-3), record("gated", 1.9, lr=1e-3)]
    found.append({**record("retnet", 0.0, seed=1, lr=2e-3), "failed": "loss nan at step 3"})
    result = compare.report(found, "retnet")
    assert [(row["variant"], row["lr"]) for row in result["rows"]] == [("retnet", 1e-3), ("gated", 1e-3)]
    assert "retnet1 did not train: loss nan at step 3" in compare.table(result) and len(result["runs"]) == 2


def test_unlike_machines_are_refused_unless_asked(refuses):
    found = [record("retnet", 2.0), record("gated", 2.0, hardware=HARDWARE | {"cpu": "b"})]
    with refuses("results of 2 kinds of machine in one table"):
        compare.check_hardware(found)
    compare.check_hardware(found, mixed=True)
    compare.check_hardware(found[:1])


def test_records_are_read_and_a_damaged_one_is_named(tmp_path, refuses):
    runs = compare.plan(["retnet", "gated"], ["1m"], [0], [1e-3])
    (tmp_path / runs[0].name).mkdir()
    (tmp_path / runs[0].name / compare.RECORD).write_text(json.dumps(record("retnet", 2.0)), encoding="utf-8")
    assert [r["variant"] for r in compare.records(tmp_path, runs)] == ["retnet"]
    for damage in ('{"bits', "{}", "[1]", '{"name": "a", "about": 1}'):
        (tmp_path / runs[0].name / compare.RECORD).write_text(damage, encoding="utf-8")
        with refuses("compared.json is damaged"):
            compare.records(tmp_path, runs)


@pytest.mark.parametrize("sizes", [["1m"], ["1m", "2m", "5m"]], ids=["one-size", "three-sizes"])
def test_the_picture_shows_every_variant(sizes, tmp_path, lines):
    found = [
        record(variant, 2.0 - 0.1 * n - 0.01 * seed, size=size, seed=seed, parameters=(n + 1) * 10**6)
        for n, size in enumerate(sizes)
        for seed in (0, 1)
        for variant in ("retnet", "transformer")
    ]
    compare.plot(compare.report(found, "retnet"), tmp_path / "a.png", title="t")
    assert {"retnet", "transformer"} <= set(lines)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
