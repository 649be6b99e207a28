"""bench/ is no package of Baton's: it is imported from the repo's root."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))
