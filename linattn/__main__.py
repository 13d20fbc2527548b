"""`python -m linattn` is `linattn`."""

from .cli import main

if __name__ == "__main__":
    main()
