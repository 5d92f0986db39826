"""`python -m retentive` is the command `retentive`."""

from retentive.cli import main

main()
