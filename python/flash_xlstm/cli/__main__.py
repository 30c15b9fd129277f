"""``python -m flash_xlstm.cli``."""

import sys

from flash_xlstm.cli import main

if __name__ == "__main__":
    sys.exit(main())
