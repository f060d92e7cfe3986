"""The entry point of `python -m consilium`; the command line itself is `consilium.cli`."""

import sys

from consilium.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
