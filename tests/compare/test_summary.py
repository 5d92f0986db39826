"""The numbers of a comparison and their uncertainty, by hand."""

import math

import pytest

from retentive.compare import summary
from tests.compare.made_up import record


def test_means_differences_and_intervals_by_hand():
    found = [
        record("retnet", 2.0, seed=0), record("retnet", 2.2, seed=1),
        record("gated", 1.9, seed=0), record("gated", 2.14, seed=1),
    ]  # fmt: skip
    base, gated = summary.summary(found, "retnet")
    assert (base["bits_per_byte"], gated["bits_per_byte"]) == (pytest.approx(2.1), pytest.approx(2.02))
    # squares within cells: 2 * 0.1^2 and 2 * 0.12^2 over two degrees of freedom; t = 4.303
    deviation = math.sqrt((0.02 + 0.0288) / 2)
    assert gated["half_width"] == pytest.approx(4.303 * deviation / math.sqrt(2))
    # seed by seed -0.10 and -0.06: their deviation has one degree of freedom; t = 12.706
    assert gated["difference"] == pytest.approx(-0.08)
    assert gated["difference_half_width"] == pytest.approx(12.706 * math.sqrt(0.0008) / math.sqrt(2))
    assert "difference" not in base and gated["recalled"] == pytest.approx(5.02)
    assert gated["tokens_per_second"] == 100.5 and gated["seeds"] == [0, 1]


def test_a_cell_of_five_seeds_has_an_interval_of_its_own():
    noise = [0.01, -0.01, 0.0, 0.02, -0.02]  # squares 0.001 over four degrees of freedom; t = 2.776
    found = [record("retnet", 2.0, seed=seed) for seed in range(5)]
    found += [record("steady", 1.9 + x, seed=seed) for seed, x in enumerate(noise)]
    found += [record("wild", 1.5 + 20 * x, seed=seed) for seed, x in enumerate(noise[:4])]
    base, steady, wild = summary.summary(found, "retnet")
    own = 2.776 * math.sqrt(0.001 / 4 / 5)
    assert base["half_width"] == 0 and steady["half_width"] == steady["difference_half_width"] == pytest.approx(own)
    # four seeds are too few: all cells together have 3 + 4 (+ 4 of the baseline's, for means) degrees of freedom
    squares = 0.001 + 400 * sum((x - 0.005) ** 2 for x in noise[:4])
    assert wild["difference_half_width"] == pytest.approx(2.365 * math.sqrt(squares / 7) / 2)
    assert wild["half_width"] == pytest.approx(2.201 * math.sqrt(squares / 11) / 2)


def test_one_seed_has_no_interval():
    (row, other) = summary.summary([record("retnet", 2.0), record("gated", 1.9)], "retnet")
    assert row["half_width"] is None and other["difference_half_width"] is None
    assert "–" in summary.table(summary.report([record("retnet", 2.0), record("gated", 1.9)], "retnet"))


def test_a_law_is_found_again():
    sizes = {"1m": 1.0, "2m": 2.3, "5m": 4.9}
    found = [
        record("retnet", 1.8 * n**-0.07, size=size, seed=seed, parameters=int(n * 1e6))
        for size, n in sizes.items()
        for seed in (0, 1)
    ]
    law = summary.law(found, "retnet")
    assert law["a"] == pytest.approx(1.8, rel=1e-6) and law["b"] == pytest.approx(0.07, rel=1e-5)
    assert law["b_half_width"] < 1e-5 and law["runs"] == 6
    assert summary.law([r for r in found if r["size"] != "5m"], "retnet") is None


def test_each_variant_counts_at_its_best_rate():
    found = [record("retnet", 2.0, lr=1e-3), record("retnet", 1.8, lr=2e-3), record("gated", 1.9, lr=1e-3),
             record("gated", 2.5, lr=2e-3)]  # fmt: skip
    assert summary.best_rates(found) == {("1m", "retnet"): 2e-3, ("1m", "gated"): 1e-3}
    result = summary.report(found, "retnet")
    differences = {(row["variant"], row["lr"]): row.get("difference") for row in result["rows"]}
    assert differences.pop(("gated", 1e-3)) == pytest.approx(0.1) and set(differences.values()) == {None}
    table = summary.table(result)
    assert "| retnet, lr 0.002 * |" in table and "| retnet, lr 0.001 |" in table
    assert "* The best learning rate of each variant" in table


def test_the_best_rate_is_told_by_the_seeds_that_all_rates_have():
    found = [record("retnet", 2.0, lr=1e-3), record("retnet", 1.9, lr=2e-3), record("retnet", 2.3, lr=2e-3, seed=1)]
    (worse, better) = summary.summary(found, "retnet")
    assert better["best_rate"] and better["bits_per_byte"] == pytest.approx(2.1) and not worse["best_rate"]
    found[0] = record("retnet", 2.0, lr=1e-3, seed=2)  # none that both have: all count
    assert summary.best_rates(found) == {("1m", "retnet"): 1e-3}


def test_what_did_not_train_is_named_and_counts_for_nobody():
    found = [record("retnet", 2.0, lr=1e-3), record("retnet", 1.8, lr=2e-3), record("gated", 1.9, lr=1e-3)]
    found.append({**record("retnet", 0.0, seed=1, lr=2e-3), "failed": "loss nan at step 3"})
    result = summary.report(found, "retnet")
    assert [(row["variant"], row["lr"]) for row in result["rows"]] == [("retnet", 1e-3), ("gated", 1e-3)]
    assert "retnet1 did not train: loss nan at step 3" in summary.table(result) and len(result["runs"]) == 2
