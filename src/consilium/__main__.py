"""`python -m consilium` is the command line, see `consilium.cli`."""

import sys

from consilium.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
