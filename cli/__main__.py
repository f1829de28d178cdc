"""`python -m vlscale.cli`, the form that launchers start."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
