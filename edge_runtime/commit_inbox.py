"""Where a transport leaves what has come from the server, for the one thread that receives."""

from __future__ import annotations

import queue

from wisp_plugin.messages import Commit


class CommitInbox:
    """Commits, and exceptions to raise in their place, in the order in which any thread has put them."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Commit | Exception | None] = queue.SimpleQueue()  # None: wake up

    def put(self, item: Commit | Exception) -> None:
        """Leave a commit, or what `take` is to raise."""
        self._items.put(item)

    def wake(self) -> None:
        """Let a `take` that waits, or else the next one that finds no commit, return None."""
        self._items.put(None)

    def take(self, timeout_s: float) -> Commit | None:
        """The next commit; None if there is none within `timeout_s`, or `wake` was called. Raises what was put."""
        try:
            item = self._items.get(timeout=timeout_s) if timeout_s > 0 else self._items.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        return item
