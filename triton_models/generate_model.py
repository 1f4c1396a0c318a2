"""`TritonPythonModel` of `wisp_generate`: text in, text out, by sessions of `wisp_verifier`."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from triton_models import pb_adapter
from triton_models.generate_request import Defaults, decode_generate
from triton_models.generate_service import GenerateService
from triton_models.generate_session import Failure
from triton_models.generate_settings import read_generate_settings, tokenizer_folder
from triton_models.local_client import LocalCalls
from triton_models.pb_generate import TextReply
from triton_models.termination import on_termination
from triton_models.text_tokenizer import TextTokenizer
from triton_models.watcher import Watcher
from wisp_plugin.errors import InvalidRequest, WispError
from wisp_plugin.vocabulary import vocab_hash

SWITCH_INTERVAL_S = 0.0005  # every session has a thread: hand it the interpreter soon

log = logging.getLogger(__name__)


class TritonPythonModel:
    """The text model as Triton sees it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; a configuration that cannot work fails the load."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        pb_adapter.log_to_triton()
        try:
            config = read_generate_settings(json.loads(args["model_config"]))
            tokenizer = TextTokenizer(tokenizer_folder(config.target))
            fingerprint = vocab_hash(tokenizer.folder)
        except WispError as error:
            raise pb_adapter.fail_load(str(error)) from None
        self._defaults = Defaults(tokenizer.vocab_size, config.max_text_bytes, config.lookup)
        self._calls = LocalCalls(config.silence_limit_s)
        self._service = GenerateService(config, tokenizer, fingerprint, self._calls)
        self._watcher = Watcher(config.cancel_poll_s, self._service.look_after)
        self._watcher.start()
        on_termination(self._service.drain)
        log.info("wisp_generate: tokenizer of %s, lookup %s, at most %d sessions",
                 tokenizer.folder, config.lookup, config.max_sessions)  # fmt: skip

    def execute(self, requests: list[Any]) -> None:
        """Hand requests to the service, which answers from threads of its own."""
        for request in requests:
            reply = TextReply(request, self._watcher)
            try:
                wanted = decode_generate(*pb_adapter.read_request(request), self._defaults)
            except InvalidRequest as error:
                reply.fail(Failure(str(error), is_ours=False))
            else:
                self._service.submit(wanted, reply)

    def finalize(self) -> None:
        """End what runs. Triton calls this when all requests have their answers."""
        self._service.stop()
        self._calls.stop()
        self._watcher.stop()
