"""`python -m hylorada` is the command `hylorada`."""

from .cli import main

if __name__ == "__main__":
    main()
