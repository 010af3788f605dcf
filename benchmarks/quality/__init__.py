"""The quality experiment: every term of the loss, its controls and honest baselines on public data, one protocol."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it tells of a kernel that is optional
