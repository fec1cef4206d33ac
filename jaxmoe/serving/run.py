"""Running the server: the socket, the engine's thread, and an end in good order."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator

import uvicorn

from jaxmoe.checks import integer, real_number
from jaxmoe.generation.async_engine import AsyncEngine
from jaxmoe.generation.continuous import ContinuousEngine
from jaxmoe.generation.eos import eos_token_ids
from jaxmoe.generation.tokenizer import tokenizer_of
from jaxmoe.models import Decoder
from jaxmoe.serving.app import make_app
from jaxmoe.serving.metrics import ExpertLoads, Metrics
from jaxmoe.serving.service import Limits, Service

LEAST_KEY = 16


def listen(host: str = "127.0.0.1", port: int = 8000, *, keys: Collection[str] = ()) -> socket.socket:
    """Take an address for `serve`, before a model is loaded that may take minutes; nobody is answered yet.

    Args:
        host: address or name of this machine; others than loopback need `keys`.
        port: port, 0 for a free one.
        keys: keys of which clients need one.

    Raises:
        ValueError: keys are missing, or too short, or the port is none.
        OSError: the address is not this machine's, or somebody listens there.
    """
    port = integer("port", port, least=0, most=65535)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"cannot listen at {host} port {port}: {error.strerror or error}") from error
    family, _, _, _, address = found[0]
    _check_keys(str(address[0]), keys)
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen at {host} port {port}: {error.strerror or error}") from error
    return bound


def _check_keys(address: str, keys: Collection[str]) -> None:
    if any(len(key) < LEAST_KEY or key.strip() != key for key in keys):
        raise ValueError(f"a key has at least {LEAST_KEY} characters, and no space around them")
    if not keys and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise ValueError(
            f"{address} is reached from other machines, so clients need a key: give --api-key-file FILE or set "
            "JAXMOE_API_KEY, or listen at 127.0.0.1"
        )


def serve(
    model: Decoder,
    bound: socket.socket,
    *,
    name: str,
    keys: Collection[str] = (),
    num_slots: int | None = None,
    num_pages: int | None = None,
    max_length: int | None = None,
    queue: int = Limits.queue,
    body_bytes: int = Limits.body_bytes,
    record: bool = True,
    rebalance: bool = False,
    drain_seconds: float = 30.0,
    on_compiled: Callable[[str], None] = lambda program: None,
    on_start: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    On the first signal no further request is let in, and those that are there go on for up to `drain_seconds`; a second
    Ctrl-C ends them.

    Args:
        model: model from `jaxmoe.load`, whose checkpoint has a tokenizer; its adapters are models of their own.
        bound: socket from `listen`, which is closed in the end.
        name: name of the model in the API.
        keys: keys of which clients need one.
        num_slots, num_pages, max_length: arguments as for `ContinuousEngine`.
        queue: requests that wait beside those that run; further ones are refused with 429.
        body_bytes: largest body of a request.
        record: whether the load of experts is counted for /metrics.
        rebalance: whether experts are moved while it serves, where the devices' loads have become uneven.
        drain_seconds: time that requests get to end.
        on_compiled: function that is called with the name of each program once it is compiled.
        on_start: function that is called with the URL once the server listens.

    Raises:
        ValueError: the address needs keys, a name is used twice, or an argument is out of range.
        FileNotFoundError: the checkpoint has no tokenizer.
        RuntimeError: the engine has ended by an error.
    """
    with bound:
        _check_keys(bound.getsockname()[0], keys)
        if model.source is None:
            raise ValueError(
                "a server needs a checkpoint's tokenizer, and this model comes from no checkpoint directory"
            )
        if name in model.adapters:
            raise ValueError(
                f"the model and its adapters have names of their own; {name!r} is an adapter's: give --name"
            )
        drain_seconds = real_number("drain_seconds", drain_seconds, least=0)  # before programs are compiled
        tokenizer, ends = tokenizer_of(model.source), eos_token_ids(model.source)
        watched = (record or rebalance) and bool(model.moe_layers)
        loads = ExpertLoads(lambda: model.placements, rebalance=rebalance) if watched else None
        made = ContinuousEngine(model, num_slots=num_slots, num_pages=num_pages, max_length=max_length, balancer=loads)
        for adapted in (False, True) if model.adapters else (False,):
            programs = made.programs.compile_all(
                made.programs.bind(model), record="nothing" if loads is None else "counts", adapted=adapted
            )
            for program in programs:
                on_compiled(program)
        limits = Limits(
            queue=integer("queue", queue, least=0),
            body_bytes=integer("body_bytes", body_bytes, least=1),
            max_length=made.sizes.max_length,
        )

        async def run() -> None:
            async with AsyncEngine(made) as engine:
                service = Service(
                    engine,
                    tokenizer,
                    names={name: None, **{adapter: adapter for adapter in model.adapters}},
                    eos_token_ids=ends,
                    limits=limits,
                    metrics=Metrics(lambda: engine.counts, loads),
                    vocab_size=model.config.vocab_size,
                )
                await run_service(service, bound, keys=keys, drain_seconds=drain_seconds, on_start=on_start)
                if engine.error is not None:
                    raise RuntimeError(f"the engine has ended: {engine.error}") from engine.error

        asyncio.run(run())


async def run_service(
    service: Service,
    bound: socket.socket,
    *,
    keys: Collection[str] = (),
    drain_seconds: float = 30.0,
    on_start: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until a signal comes or the engine ends; arguments are those of `serve`."""
    config = uvicorn.Config(
        make_app(service, keys),
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    host, port = bound.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    await _Server(config, service, lambda: on_start(url)).serve(sockets=[bound])


class _Server(uvicorn.Server):
    """uvicorn, which tells the service of a signal and does not end the process by it, and ends with the engine."""

    def __init__(self, config: uvicorn.Config, service: Service, on_start: Callable[[], None]):
        super().__init__(config)
        self._service, self._on_start = service, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._service.engine.error is not None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.drain, number)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def drain(self, number: int) -> None:
        """Let in no further request, and end when those that are there have ended."""
        self._service.draining = True
        self.handle_exit(number, None)
