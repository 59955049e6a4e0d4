"""What all tests share: the helpers in `support/`, and threads that do not fight over the cores."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# OpenMP threads that spin while they wait make tests many times slower wherever more processes run
# than there are cores, as under pytest-xdist. It counts only if set before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

sys.path.insert(0, str(Path(__file__).parent))
