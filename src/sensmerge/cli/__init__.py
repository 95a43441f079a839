"""The `sensmerge` command (floor 8): one file a command. Results go to standard output, everything else to standard error."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
