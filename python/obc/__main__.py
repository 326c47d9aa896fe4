"""``python -m obc``: the same as the command ``obc``."""

import sys

from obc_command import main

if __name__ == "__main__":
    sys.exit(main())
