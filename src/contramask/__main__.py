"""`python -m contramask VERB`, the same as the console script."""

from contramask.cli.main import main

if __name__ == "__main__":
    main()
