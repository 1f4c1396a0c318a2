"""WISP's core: sessions, scheduler, coupling and wire format. Standard library and numpy only."""

__version__ = "0.1.0"
