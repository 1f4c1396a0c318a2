"""The gateway's application: its routes, and the device that `wisp-edge serve` is told to be."""

from __future__ import annotations

import argparse
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import tritonclient.grpc as triton
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_runtime.drafting_thread import set_switch_interval
from edge_runtime.gateway import openai_routes, tgi_routes, ui_routes
from edge_runtime.gateway.device import GatewayDevice, Speculation, make_dealer
from edge_runtime.gateway.parameters import Limits
from edge_runtime.gateway.service import Gateway
from edge_runtime.gateway.sessions import Sessions
from edge_runtime.gateway.spare import Spare
from edge_runtime.generate import beliefs_of, slo_of, tls_files
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.transport import VERIFIER_MODEL, GrpcStream, TlsFiles, connect
from wisp_plugin.errors import ConfigError, TransportError
from wisp_plugin.home import DEFAULT_MODEL, DRAFT_NAMES, draft_folder
from wisp_plugin.messages import Mode
from wisp_plugin.speculation import make_controller
from wisp_plugin.vocabulary import vocab_hash

READY_S = 2.0  # limit of asking the server for its health
SHUTDOWN_S = 5  # for requests that run when the gateway is told to end
_KEEPALIVE_S = 20.0


def make_app(gateway: Gateway) -> Starlette:
    """The ASGI application; its sessions end with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await gateway.sessions.close()

    every = [part.routes(gateway) for part in (tgi_routes, openai_routes, ui_routes)]
    handlers = {HTTPException: _no_such_route}
    return Starlette(routes=[route for part in every for route in part], lifespan=lifespan, exception_handlers=handlers)


async def _no_such_route(request: Request, error: Exception) -> Response:
    """Also a wrong method."""
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}"
    body = {"error": text, "error_type": "not_found"}
    if request.url.path.startswith("/v1/"):
        body = {"error": {"message": text, "type": "invalid_request_error", "param": None, "code": "not_found"}}  # type: ignore[dict-item]
    return JSONResponse(body, error.status_code, headers=error.headers)


def load_device(args: argparse.Namespace) -> GatewayDevice:
    """What `args` name. Raises ModelError or ConfigError."""
    slo = slo_of(args)
    tls = tls_files(args)
    folder = draft_folder(args.draft)
    speculation = None if args.no_draft else _speculation(args, folder)
    tokenizer = Tokenizer.load(folder)
    fingerprint = vocab_hash(folder)
    default_name = DEFAULT_MODEL if args.draft in DRAFT_NAMES else folder.resolve().name
    return GatewayDevice(
        tokenizer=tokenizer,
        limits=Limits(tokenizer.vocab_size, args.max_total_tokens),
        slo=slo,
        connect=lambda: GrpcStream(args.server, tls, fingerprint),
        is_ready=_readiness(args.server, tls),
        model_id=args.model_id or default_name,
        speculation=speculation,
        server_wait_s=args.server_wait,
    )


def _speculation(args: argparse.Namespace, folder: Path) -> Speculation:
    model, price = beliefs_of(args)
    make_controller(args.rule, Mode.FREE, model, price)  # a rule that cannot be is refused before anything is loaded
    dealer, context = make_dealer(folder, args.threads, args.drafters)
    return Speculation(dealer, model, context, args.draft, args.rule, price)


def _readiness(server: str, tls: TlsFiles | None) -> Callable[[], bool]:
    """Asks whether the verifier is ready, over a new connection: one that is kept would be slow to come back."""

    def is_ready() -> bool:
        try:
            client = connect(server, tls, _KEEPALIVE_S)
            with contextlib.closing(client):
                return bool(client.is_model_ready(VERIFIER_MODEL, client_timeout=READY_S))
        except (triton.InferenceServerException, TransportError, ConfigError):  # ConfigError: the token's file has gone
            return False

    return is_ready


def _check(args: argparse.Namespace) -> None:
    limits = {
        "port": (0, 65535), "drafters": (1, 256), "max_sessions": (1, 4096), "max_requests": (1, 65536),
        "max_total_tokens": (2, 1 << 20), "server_wait": (0.1, 3600.0),
    }  # fmt: skip
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if not low <= value <= high:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; allowed: {low} to {high}")
    if args.max_requests < args.max_sessions:
        allowed = f"--max-sessions, which is {args.max_sessions}, or more"
        raise ConfigError(f"--max-requests is {args.max_requests}; allowed: {allowed}")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}); choose with --host and --port") from None
    return sock


def main(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    _check(args)
    set_switch_interval()  # the event loop must not wait for a session's thread to have its 5 ms
    sock = _listen(args.host, args.port)
    with sock:
        device = load_device(args)
        spare = Spare(cast("Callable[[], GrpcStream]", device.connect))  # what `load_device` connects with
        device.connect, device.prepare = spare.take, spare.prepare
        gateway = Gateway(device, Sessions(device, args.max_sessions, args.max_requests))
        config = uvicorn.Config(
            make_app(gateway), log_level="warning", access_log=False, timeout_graceful_shutdown=SHUTDOWN_S
        )
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        sock.listen()  # who reads the line below may connect at once
        print(f"wisp-edge: serving {device.model_id} on http://{shown}:{port}, page at /ui", flush=True)
        try:
            uvicorn.Server(config).run(sockets=[sock])
        finally:
            spare.close()
    return 0
