"""The clock that waits and deadlines go by.

Tools that freeze time for a test (freezegun) put their own functions wherever a module holds the
real ones. A wait that counts on a frozen clock never ends. They do not know this one, which is
another object.
"""

from __future__ import annotations

import time
from functools import partial

monotonic = partial(time.monotonic)
monotonic_ns = partial(time.monotonic_ns)
