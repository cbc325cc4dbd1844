"""`python -m dinoreg` is the command `dinoreg`."""

import sys

from dinoreg.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
