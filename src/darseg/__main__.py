"""`python -m darseg` and the `darseg` command."""

from darseg.cli import main

if __name__ == "__main__":
    main()
