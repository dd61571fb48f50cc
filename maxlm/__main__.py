"""`python -m maxlm` is `maxlm`."""

import sys

from maxlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
