"""`python -m sensmerge` is the `sensmerge` command."""

from .cli import main

if __name__ == "__main__":
    main()
