"""The ranks' processes import the tests by their full names."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
