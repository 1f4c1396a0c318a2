"""What a gateway says no with: a status, one line, and its form for clients of TGI and of OpenAI.

    422 validation   the request is wrong or asks for what is not offered        400 bad_request   no JSON object at all
    424 generation   the server refused or broke the session                     413 validation    the body is too long
    429 overloaded   no room here or on the server: come back later              503 unhealthy     no server
    404 not_found    no such route or model                                      500 internal      a defect of ours
"""

from __future__ import annotations

from typing import Any

from wisp_plugin.errors import ConfigError, ModelError, RequestRefused, TransportError, WispError

RETRY_AFTER_S = 2  # what a client that is sent away is asked to wait
_OPENAI_TYPES = {"validation": "invalid_request_error", "overloaded": "rate_limit_error", "unhealthy": "server_error"}
_OVERLOADED = "is overloaded"  # in what `client` raises after waiting for an overloaded server
_OUT_OF_RANGE = ("parameter '", "context window", "the prompt has ", "KV")  # of the server's words on an open


class Refusal(WispError):
    """An answer that is an error. `param` names the field that it is about."""

    def __init__(self, status: int, error_type: str, message: str, param: str | None = None) -> None:
        super().__init__(_sendable(message))
        self.status, self.error_type = status, error_type
        self.param = None if param is None else _sendable(param)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {"retry-after": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}

    def tgi(self) -> dict[str, Any]:
        """The body for a client of Text Generation Inference."""
        return {"error": str(self), "error_type": self.error_type}

    def openai(self) -> dict[str, Any]:
        """The body for a client of OpenAI."""
        kind = _OPENAI_TYPES.get(self.error_type, "server_error" if self.status >= 500 else "api_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.error_type}}


def _sendable(text: str) -> str:
    """`text` as UTF-8 can hold it: names of fields come from the client, who may write half a surrogate pair."""
    return text.encode(errors="backslashreplace").decode()


def invalid(message: str, param: str | None = None) -> Refusal:
    """A request that is wrong; `message` is one line that says what is allowed."""
    return Refusal(422, "validation", f"Input validation error: {message}", param)


def overloaded(message: str) -> Refusal:
    """No room."""
    return Refusal(429, "overloaded", f"Model is overloaded: {message}")


def failed_generation(message: str) -> Refusal:
    """The session broke."""
    return Refusal(424, "generation", f"Request failed during generation: {message}")


def unhealthy(message: str) -> Refusal:
    """No server."""
    return Refusal(503, "unhealthy", message)


def defect() -> Refusal:
    """What nobody but us can have caused."""
    return Refusal(500, "internal", "the gateway has a defect; its log tells more")


def refusal_of(error: Exception) -> Refusal | None:
    """What a session's failure means to its client; None for what no client can have caused (a defect)."""
    if isinstance(error, Refusal):
        return error
    text = str(error)
    if isinstance(error, RequestRefused):
        if any(words in text for words in _OUT_OF_RANGE):
            return invalid(text)
        return failed_generation(text)
    if isinstance(error, TransportError):
        return overloaded(text) if _OVERLOADED in text else unhealthy(text)
    if isinstance(error, ConfigError):  # a file of the operator's that is read anew, such as the token's
        return unhealthy(f"the gateway is not set up right: {text}")
    if isinstance(error, ModelError):
        return failed_generation(text)
    return None
