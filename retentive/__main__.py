"""`python -m retentive` is the command `retentive`."""

from retentive.cli import main

if __name__ == "__main__":
    main()
