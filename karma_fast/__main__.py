"""``python -m karma_fast`` is ``karma-fast``."""

import sys

from .cli import main

sys.exit(main())
