"""What a request and the server may take, and how what is refused is answered."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Limits; what exceeds one is answered with a 4xx or a 503.

    Attributes:
        body_bytes: Most bytes of a request's body; eight times as much of all bodies that are held.
        inputs: Most texts and images of a request.
        pixels: Most pixels of an image.
        queue: Most inputs of all requests that were let in and have no answer yet.
        seconds: Longest time of a request, its body's arrival included.
        connections: Most requests at a time.
        wait_seconds: How long a batch that is not full waits for more inputs.
    """

    body_bytes: int = 32 << 20
    inputs: int = 2048
    pixels: int = 64_000_000
    queue: int = 4096
    seconds: float = 60.0
    connections: int = 256
    wait_seconds: float = 0.005


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: The HTTP status.
        message: What was given, what was expected, how to mend it.
        code: A word for programs, such as `queue_full`.
        param: The field at fault.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The answer's body, as OpenAI's."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
