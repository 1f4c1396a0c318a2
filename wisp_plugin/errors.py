"""Every error that WISP raises on purpose.

    WispError                 one line for a person: what was wrong, what is allowed
    ├── InvalidRequest        malformed or out-of-range input from the wire
    │   └── UnknownSession    a draft for a session that this server does not hold
    ├── ConfigError           configuration or command line that cannot work
    ├── ModelError            model folder or draft graph missing, damaged or of an unknown kind
    ├── TransportError        the connection broke or cannot be made; opening again may help
    │   └── RequestRefused    the server answered with an error; opening again will not help
    ├── EngineFailed          the engine thread died; the server has to be restarted
    └── CapacityError         KV memory is exhausted: the plan asked for more than there is (a bug)
"""

from __future__ import annotations


class WispError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one line without a traceback."""


class InvalidRequest(WispError):
    """Input from outside is malformed, out of range or unknown."""


class UnknownSession(InvalidRequest):
    """The session named in a request is not held by this server."""


class ConfigError(WispError):
    """The configuration cannot work."""


class ModelError(WispError):
    """A model folder or graph is missing, damaged or of an unknown kind."""


class TransportError(WispError):
    """The connection to the server broke or could not be made."""


class RequestRefused(TransportError):
    """The server refused a request; repeating it would give the same answer."""


class EngineFailed(WispError):
    """The engine thread has stopped after an unexpected error."""


class CapacityError(WispError):
    """More KV memory was asked for than is free."""
