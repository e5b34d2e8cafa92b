"""The demo: two families of real models, merged by the real command.  Run it with `make demo`."""

from __future__ import annotations

import os

# Two threads that spin while waiting for each other are slower than one as soon as anything else runs on
# the machine.  Both must be set before torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
