"""The small models of the layer above are used here too, in every process."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parent.parent))
