"""`python -m vpgea_fast.cli`."""

import sys

from vpgea_fast.cli import main

sys.exit(main())
