"""`python -m benchmarks NAME`: flags, files and errors as of `retentive bench NAME`; `redraw FILE…` for old results."""

from pathlib import Path

from benchmarks import BENCHES
from retentive import cli


def run(argv: list[str]) -> None:
    """Measure what `argv` names, or show results anew."""
    cli.prepare()
    if argv[:1] == ["redraw"]:
        from benchmarks.redraw import redraw

        for path in redraw([Path(name) for name in argv[1:]]):
            print(path)
        return
    from retentive.cli import bench  # loads torch, so after `prepare`

    bench.main(argv, BENCHES, "python -m benchmarks")
    if not argv or argv[0] in ("-h", "--help"):
        print("\n  redraw FILE…  Tables and pictures of results anew, from the numbers in their files.")


if __name__ == "__main__":
    cli.main(program=run)
