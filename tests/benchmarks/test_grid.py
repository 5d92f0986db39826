"""`bench grid`: rows, growth, the gate, and what is refused."""

import json

import pytest

from benchmarks import grid
from benchmarks.grid import Options


def test_growth_is_of_neighbouring_grids(monkeypatch, tmp_path):
    # seconds as they would be: linear and quadratic in the patches
    def timed(runs, device, **_):
        patches = runs["attention"].args[0].shape[1]
        assert runs["retention"]().shape[1:3].numel() == patches
        return {"retention": [patches / 1e6], "attention": [patches**2 / 1e9]}

    monkeypatch.setattr(grid.clock, "interleaved", timed)
    said = []
    result = grid.measure(Options(sides=(8, 4), dim=16), said.append)
    assert [row["patches"] for row in result["rows"]] == [16, 64] and len(said) == 2
    found = result["rows"][1]["models"]
    assert found["retention"]["exponent"] == pytest.approx(1) and found["attention"]["exponent"] == pytest.approx(2)
    assert result["off_by"] < grid.TOLERANCE and json.dumps(result)
    assert "| 8 x 8 | 64 | 64 us | 1.00 | 4.1 us | 2.00 |" in grid.table(result)
    pytest.importorskip("matplotlib", reason="pictures need pip install 'retentive[plot]'")
    grid.plot(result, tmp_path / "a.png", title="a")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_wrong_operator_is_not_timed(monkeypatch):
    right = grid.bidirectional
    monkeypatch.setattr(grid, "bidirectional", lambda *given, **how: right(*given, **how) * (1 + 1e-9))
    with pytest.raises(ArithmeticError, match=r"off by .* not timed"):
        grid.measure(Options(sides=(4,), dim=16))


@pytest.mark.parametrize("name", ["sides", "dim", "heads", "repeats"])
def test_numbers_below_one_are_refused(name, refuses):
    with refuses("`: must be at least 1"):
        grid.measure(Options(**{name: (0,) if name == "sides" else 0}))
