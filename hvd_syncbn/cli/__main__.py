"""``python -m hvd_syncbn.cli``."""

import sys

from hvd_syncbn.cli import main

sys.exit(main())
