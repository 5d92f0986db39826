"""The picture of a comparison shows every variant."""

import pytest

from retentive.compare import pictures, summary
from tests.compare.made_up import HARDWARE, record


def plot(found, path, baseline="retnet", **more):
    """Draw the result of these runs, as `Comparison.result` makes it."""
    pictures.plot({"hardware": HARDWARE, **summary.report(found, baseline), **more}, path / "a.png", title="t")


@pytest.mark.parametrize("sizes", [["1m"], ["1m", "2m", "5m"]], ids=["one-size", "three-sizes"])
def test_the_picture_shows_every_variant(sizes, tmp_path, lines):
    found = [
        record(variant, 2.0 - 0.1 * n - 0.01 * seed, size=size, seed=seed, parameters=(n + 1) * 10**6)
        for n, size in enumerate(sizes)
        for seed in (0, 1)
        for variant in ("retnet", "transformer")
    ]
    plot(found, tmp_path)
    assert {"retnet", "transformer"} <= set(lines)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_means_of_the_seeds(tmp_path, lines):
    found = [record("retnet", 2.0 + 0.1 * seed, seed=seed) for seed in range(3)]
    plot(found, tmp_path)
    by_tokens, by_time = lines["retnet"]
    assert by_tokens == ([0.0005, 0.001], [pytest.approx(3.1), pytest.approx(2.1)])
    assert by_time[0] == [pytest.approx(500 / 60 / 101), pytest.approx(1000 / 60 / 101)], "at the median of the speeds"


def test_a_picture_has_eight_curves_at_most_and_names_all_variants(tmp_path, lines, monkeypatch):
    names = [f"v{n}" for n in range(12)]
    drawn = []
    monkeypatch.setattr(pictures, "legend", lambda figure, axes: drawn.extend(axes.flat))
    plot([record(v, 3.0 - 0.1 * n) for n, v in enumerate(names)], tmp_path, "v0")
    assert set(lines) == {"v0", *names[5:]}, "the baseline, though the worst, and the best"
    ranked, _, by_tokens, _ = drawn
    assert [tick.get_text() for tick in ranked.get_yticklabels()] == names
    assert len(by_tokens.get_lines()) == 8 and "the best 7 of 12 variants" in by_tokens.get_title()


def test_a_panel_with_one_point_is_left_out(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "legend", lambda figure, axes: drawn.extend(axes.flat))
    plot([record("retnet", 2.0)], tmp_path)
    assert [axis.get_xlabel().split()[0] for axis in drawn] == ["tokens", "minutes"]


def test_minutes_of_different_processors_are_left_out(tmp_path, lines):
    machines = [HARDWARE, {**HARDWARE, "cpu": "another"}]
    plot([record("retnet", 2.0)], tmp_path, machines=machines)
    assert len(lines["retnet"]) == 1, "by tokens alone"


def test_an_optimiser_is_another_stroke_of_its_model():
    found = pictures.looks(["a", "a+muon", "b", "b+muon"])
    assert [look["color"] for look in found.values()] == ["C0", "C0", "C1", "C1"]
    assert [look["linestyle"] for look in found.values()] == ["-", "--", "-", "--"]
    alike = pictures.looks([str(n) for n in range(8)])
    assert len({look["color"] for look in alike.values()}) == 8, "no two alike"
