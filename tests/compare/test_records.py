"""Records of runs: read, refused if damaged, and of different machines on request only."""

import json

import pytest

from retentive.compare.records import RECORD, Run, check_done, check_hardware, records
from retentive.models import retnet
from tests.compare.made_up import HARDWARE, record


def test_unlike_machines_are_refused_unless_asked(refuses):
    found = [record("retnet", 2.0), record("gated", 2.0, hardware=HARDWARE | {"cpu": "b"})]
    with refuses("results of 2 kinds of machine in one table"):
        check_hardware(found)
    check_hardware(found, mixed=True)
    check_hardware(found[:1])


def test_records_are_read_and_a_damaged_one_is_named(tmp_path, refuses):
    runs = [Run("retnet", "1m", 0, 1e-3), Run("gated", "1m", 0, 1e-3)]
    (tmp_path / runs[0].name).mkdir()
    (tmp_path / runs[0].name / RECORD).write_text(json.dumps(record("retnet", 2.0)), encoding="utf-8")
    assert [r["variant"] for r in records(tmp_path, runs)] == ["retnet"]
    for damage in ('{"bits', "{}", "[1]", '{"name": "a", "about": 1}'):
        (tmp_path / runs[0].name / RECORD).write_text(damage, encoding="utf-8")
        with refuses("compared.json is damaged"):
            records(tmp_path, runs)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_option_that_a_record_does_not_know_is_at_its_default_there(optimizer, tmp_path, refuses):
    """Such as the optimiser of runs from before there was a choice."""
    file = tmp_path / RECORD
    file.write_text(json.dumps(record("retnet", 2.0, about={"train": {"lr": 1e-3}})), encoding="utf-8")
    wanted = {"train": {"lr": 1e-3, "optimizer": optimizer}}
    if optimizer == "adamw":
        check_done(file, wanted, retnet())
        return
    with refuses("of another comparison (optimizer adamw, now muon); choose another `out`"):
        check_done(file, wanted, retnet())
