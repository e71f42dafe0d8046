"""What a hostile file holds."""

import os
from pathlib import Path


class Evil:
    """A pickle of this leaves a folder behind when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)
