"""`retentive completion`: scripts for shells, tried in those that are there."""

import shutil
import subprocess

import pytest

from retentive.cli import VERBS, main
from retentive.cli.completion import script


@pytest.fixture(scope="module")
def scripts():
    return {shell: script(shell) for shell in ("bash", "zsh", "fish")}


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("retentive tr", {"train"}),
        ("retentive train --lo", {"--lora", "--lora-alpha", "--lora-targets"}),
        ("retentive memory write --se", {"--seed", "--separate"}),  # of all its verbs
        ("retentive bench decode --ful", {"--full-heads"}),
        ("retentive chat my", set()),  # left to the shell, which completes files
    ],
)
def test_bash_completes(typed, wanted, scripts, tmp_path):
    if not shutil.which("bash"):
        pytest.skip("no bash here")
    words = typed.split()
    code = f"{scripts['bash']}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _retentive; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert set(done.stdout.split()) == wanted


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_script(shell, scripts, tmp_path):
    assert all(verb in scripts[shell] for verb in VERBS)
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(scripts[shell])
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_the_command(capsys):
    main(["completion", "fish"])
    assert "complete -c retentive -n '__fish_seen_subcommand_from train' -l steps" in capsys.readouterr().out
