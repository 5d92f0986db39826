"""`python -m benchmarks NAME`: flags, files and errors as of `retentive bench NAME`."""

from benchmarks import BENCHES
from retentive import cli


def run(argv: list[str]) -> None:
    """Measure what `argv` names."""
    cli.prepare()
    from retentive.cli import bench  # loads torch, so after `prepare`

    bench.main(argv, BENCHES, "python -m benchmarks")


if __name__ == "__main__":
    cli.main(program=run)
