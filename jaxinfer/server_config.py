"""The options of `jaxinfer serve` that are not the engine's. Apart from the server, as the command line needs no FastAPI."""

from dataclasses import dataclass

API_KEY_VARIABLE = "JAXINFER_API_KEY"


@dataclass(frozen=True)
class ServerConfig:
    """The server's own options.

    host, port: where to listen; port 0 takes any free one. api_key: asked as a bearer token of everything but /health,
        /ready, /version and /metrics; None takes the environment's JAXINFER_API_KEY, or asks for none.
    served_model_name: names to answer to, the first of them in answers; None is the model's own.
    allowed_origins: origins that browsers may call from (CORS); None is none.
    max_queued_requests: sequences that may wait beyond max_num_seqs before new ones get a 429.
    max_request_bytes: of a body, before a 413.
    shutdown_timeout: seconds that running requests get to finish after SIGTERM.
    warmup: compile every program before the first request is taken.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: list[str] | None = None
    allowed_origins: list[str] | None = None
    max_queued_requests: int = 1024
    max_request_bytes: int = 16 << 20
    shutdown_timeout: float = 30.0
    warmup: bool = True

    def __post_init__(self) -> None:
        for name, low in (("port", 0), ("max_queued_requests", 0), ("max_request_bytes", 1), ("shutdown_timeout", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)!r}: it must be at least {low}")
        if self.port > 65535:
            raise ValueError(f"port = {self.port}: it must be at most 65535")
        if self.api_key is not None and not self.api_key:
            raise ValueError("api_key is empty: leave it out to ask for none")
