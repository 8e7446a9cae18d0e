"""``python -m hvd_syncbn.horovod_build``."""

import sys

from hvd_syncbn.horovod_build import main

sys.exit(main())
