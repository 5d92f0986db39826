"""Tables and picture of `bench retention`, against hand-made rows."""

import pytest

from benchmarks import retention_report

RATES = {"gemm": 1e11, "read": 1e10, "copy": 1e10}


def made_row(T: int, dtype: str, **seconds) -> dict:
    def one(name, s):
        out = {"backend": name, "chunk": 64, "seconds": s, "forward_seconds": s / 3, "fraction": 0.5}
        return out | {"peak_bytes": int(s * 1e9)} | ({"seconds_by_chunk": {}} if name == "torchscale" else {})

    row = {"shape": "small", "B": 1, "H": 8, "K": 64, "V": 128, "T": T, "dtype": dtype, "qkvo_bytes": 1_000_000}
    row |= {"contestants": {n: one(n, s) if isinstance(s, float) else {"skipped": s} for n, s in seconds.items()}}
    return row | {"machine": {"before": RATES, "after": RATES}, "limit": {"seconds": 0.001}}


RESULT = {
    "hardware": {"cpu": "a CPU", "gpu": "none", "threads": 2},
    "device": "cpu",
    "no_compiled_kernel": "no C compiler found",
    "rivals": {"torchscale": "0.3.0", "sdpa": "2.13", "fla": "needs a GPU"},
    "rows": [
        made_row(8192, "fp32", retentive=0.02, blocked=0.04, torchscale=0.06, sdpa=0.5),
        made_row(32768, "fp32", retentive=0.08, blocked=0.16, torchscale=0.24, sdpa="would take 700 s"),
        made_row(8192, "bf16", retentive=0.01, blocked=0.02, torchscale=0.02, sdpa=0.4),
    ],
}


def test_the_table_holds_times_ratios_growth_and_dtypes():
    rows, growth, dtypes, notes = (part.splitlines() for part in retention_report.table(RESULT).split("\n\n"))
    for part in (rows, growth, dtypes):
        assert len({line.count("|") for line in part}) == 1
    cells = [cell.strip() for cell in rows[2].strip("|").split("|")]
    assert cells[:6] == ["small (8 x 64/128)", "8,192", "fp32", "20 ms (retentive)", "6.67 ms", "50%"]
    assert cells[6:10] == ["2.00x", "3.00x (C=64)", "25.00x", "needs a GPU"]
    assert cells[10:] == ["20.0 MB", "20.00", "2.00x", "3.00x", "25.00x"]
    assert "would take 700 s" in rows[3]
    assert "| 8k to 32k: 4x | 4.0x, 4.0x | 4.0x, 4.0x | 4.0x, 4.0x | – |" in growth[2] and len(growth) == 3
    assert "| 8,192 | bf16 | 2.00x faster than fp32 |" in dtypes[2] and len(dtypes) == 3
    assert "Without our compiled kernel: no C compiler found" in "".join(notes)
    assert "fp32 GEMM 100 GFLOP/s, reading 10 GB/s (a CPU)" in "".join(notes) and "torchscale: 0.3.0" in "".join(notes)


def test_a_disturbed_machine_is_told():
    busy = {**RESULT["rows"][0], "machine": {"before": RATES, "after": {**RATES, "gemm": 5e10}}}
    assert "did other work" in retention_report.table({**RESULT, "rows": [RESULT["rows"][0], busy]})
    assert "did other work" not in retention_report.table(RESULT)


def test_the_plot_shows_every_rival_at_the_lengths_it_ran(tmp_path, lines):
    retention_report.plot(RESULT, tmp_path / "retention.png", title="a title")
    assert lines["retentive"] == [
        ([8192, 32768], pytest.approx([20, 80])), ([8192, 32768], pytest.approx([20, 80])), ([8192, 32768], [0.5, 0.5]),
    ]  # fmt: skip
    assert lines["SDPA"][0] == ([8192], [500.0])
    assert lines["limit; size of q, k, v, o"][0] == ([8192, 32768], [1.0, 1.0])
