"""The picture of a comparison shows every variant."""

import pytest

from retentive.compare import pictures, summary
from tests.compare.made_up import record


@pytest.mark.parametrize("sizes", [["1m"], ["1m", "2m", "5m"]], ids=["one-size", "three-sizes"])
def test_the_picture_shows_every_variant(sizes, tmp_path, lines):
    found = [
        record(variant, 2.0 - 0.1 * n - 0.01 * seed, size=size, seed=seed, parameters=(n + 1) * 10**6)
        for n, size in enumerate(sizes)
        for seed in (0, 1)
        for variant in ("retnet", "transformer")
    ]
    pictures.plot(summary.report(found, "retnet"), tmp_path / "a.png", title="t")
    assert {"retnet", "transformer"} <= set(lines)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_optimiser_is_a_lighter_shade_of_its_model():
    assert pictures.shades(["a", "a+muon", "b", "b+muon"]) == {"a": 0, "a+muon": 1, "b": 2, "b+muon": 3}
    assert pictures.shades(["a+muon", "b", "b+muon"]) == {"a+muon": 1, "b": 2, "b+muon": 3}
    names = [str(n) for n in range(12)]
    assert list(pictures.shades([*names, *names]).values()) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 1, 3]
    for many in (names, [f"{n}{o}" for n in range(11) for o in ("", "+muon")][:20], ["a", "b+muon"]):
        assert len(set(pictures.shades(many).values())) == len(many), "no two alike"
