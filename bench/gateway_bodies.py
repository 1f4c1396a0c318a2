"""Request bodies for the gateway's routes that a client might send by mistake or on purpose: a hypothesis strategy.

Some are right, most are nearly right, some are no JSON at all. `max_new_tokens` is small or refused: every run ends.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

GENERATE_ROUTES = ("/", "/generate", "/generate_stream")
OPENAI_ROUTES = ("/v1/completions", "/v1/chat/completions")
ROUTES = (*GENERATE_ROUTES, *OPENAI_ROUTES, "/tokenize", "/ui/stream")

_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=12), st.just("\ud800")
)
_JUNK = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_NO_JSON = st.binary(max_size=40) | st.sampled_from([b"", b"{", b"[" * 3000, b'{"a":1e999}', b"9" * 5000])
_ODD_TEXTS = ["", "<|im_start|>user\nhi<|im_end|>", "<|endoftext|>", "🙂" * 9, "\x00", "a" * 4000, "\ud83d"]
_PLAIN_TEXTS = st.text(alphabet="ab c\n🙂", min_size=1, max_size=40)
_TEXTS = st.one_of(_PLAIN_TEXTS, st.text(max_size=40), st.sampled_from(_ODD_TEXTS))
_NUM_NEW = st.one_of(
    st.integers(1, 4), st.integers(1, 4), st.sampled_from([0, -1, 10**6, 2**63, 2**200, 1.0, 2.5, "3", True, []])
)
_STOPS = st.lists(st.text(alphabet="ab e.", min_size=1, max_size=3), max_size=4)
_COMMON: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0.1, 3.0) | st.just(1),
    "top_p": st.floats(0.1, 1.0),
    "seed": st.integers(0, 2**63 - 1) | st.none(),
    "repetition_penalty": st.floats(0.5, 2.0),
    "top_k": st.integers(1, 50),
}
_TGI = _COMMON | {
    "do_sample": st.booleans(), "details": st.booleans(), "return_full_text": st.booleans(), "stop": _STOPS,
    "truncate": st.integers(1, 3), "best_of": st.just(1), "watermark": st.just(False), "adapter_id": st.none(),
}  # fmt: skip
_OPENAI = _COMMON | {
    "model": st.text(max_size=5), "n": st.just(1), "stream": st.booleans(), "user": st.text(max_size=3),
    "stop": _STOPS | st.text(alphabet="ab", min_size=1), "presence_penalty": st.just(0), "tools": st.just([]),
}  # fmt: skip
_UNSUPPORTED: dict[str, st.SearchStrategy[Any]] = {
    "decoder_input_details": st.booleans(), "typical_p": st.floats(0, 1), "top_n_tokens": st.integers(0, 2),
    "frequency_penalty": st.floats(-2, 2), "grammar": _JUNK, "logit_bias": _JUNK, "response_format": _JUNK,
    "stream_options": _JUNK, "echo": st.booleans(), "logprobs": st.booleans() | st.integers(-1, 6), "n": st.integers(),
}  # fmt: skip
_ROLES = st.sampled_from(["user", "user", "assistant", "system", "tool"])
_MESSAGES = st.lists(st.fixed_dictionaries({"role": _ROLES, "content": _TEXTS}), min_size=1, max_size=3)


@st.composite
def _fields(draw: st.DrawFn, right: dict[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    """Some of the fields, all right; or, once in three times, one of any kind or one that is not supported besides."""
    names = draw(st.lists(st.sampled_from(sorted(right)), max_size=4, unique=True))
    body = {name: draw(right[name]) for name in names}
    spoil = draw(st.integers(0, 5))
    if spoil == 1:
        body[draw(st.sampled_from(sorted(right)) | st.text(max_size=8) | st.just("\ud800"))] = draw(_JUNK)
    elif spoil == 2:
        name = draw(st.sampled_from(sorted(_UNSUPPORTED)))
        body[name] = draw(_UNSUPPORTED[name])
    return body


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A route and the bytes to post to it. What is generated is bounded: the number of tokens is always given."""
    route = draw(st.sampled_from(ROUTES))
    if draw(st.integers(0, 19)) == 0:
        return route, draw(_NO_JSON)
    is_junk = draw(st.integers(0, 9)) == 0  # prompt or messages of any kind
    num_new = draw(_NUM_NEW)
    if route in GENERATE_ROUTES or route == "/tokenize":
        parameters = draw(_fields(_TGI)) | {"max_new_tokens": num_new}
        body: dict[str, Any] = {"inputs": draw(_JUNK if is_junk else _TEXTS), "parameters": parameters}
        if route == "/" and draw(st.booleans()):
            body["stream"] = draw(st.booleans())
    elif route == "/ui/stream":
        body = {"messages": draw(_JUNK if is_junk else _MESSAGES), "max_new_tokens": num_new}
        body["draft"] = draw(st.booleans())
    else:
        body = draw(_fields(_OPENAI)) | {"max_tokens": num_new}
        if "chat" in route:
            body["messages"] = draw(_JUNK if is_junk else _MESSAGES)
        else:
            body["prompt"] = draw(_JUNK if is_junk else _TEXTS)
    return route, json.dumps(body).encode()
