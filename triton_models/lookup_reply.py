"""A reply that drafts: for sessions whose client leaves drafting and acknowledging to the server (`wisp_generate`).

It sees every commit in the engine's thread, before the next pass is planned, so a draft that it submits then takes part
in that pass. From another process the same draft would come a pass later: on the committed texts that gives 1.38 times
the speed without drafts, instead of 1.54 times (a token in a pass costing 0.05 passes).
"""

from __future__ import annotations

from collections.abc import Callable

from wisp_plugin.messages import Close, Commit, Draft, Open
from wisp_plugin.prompt_lookup import PromptLookup
from wisp_plugin.protocols import Reply

CHOICES = ("auto", "off")

Submit = Callable[[Open | Draft | Close, Reply], None]


class LookupReply:
    """`engine.Reply` that submits a draft behind every commit that deserves one."""

    def __init__(self, reply: Reply, submit: Submit, drafts: PromptLookup) -> None:
        self._reply, self._submit, self._drafts = reply, submit, drafts
        self.finish = reply.finish
        self.fail = reply.fail
        self.is_cancelled = reply.is_cancelled

    def send(self, commit: Commit) -> None:
        """See `Reply.send`."""
        draft = self._drafts.on_commit(commit)
        if draft is not None:
            self._submit(draft, _NOBODY)
        self._reply.send(commit)


class _Nobody:
    """Nobody waits for the answer to a message of the server's own; one that comes too late is no loss."""

    def send(self, commit: Commit) -> None:
        """It has no commits."""

    def finish(self) -> None:
        """It was taken."""

    def fail(self, message: str) -> None:
        """The session has ended meanwhile."""

    def is_cancelled(self) -> bool:
        """It cannot be."""
        return False


_NOBODY = _Nobody()
