"""Endpoints of one worker by their key, and how each ends. All of it runs in the worker's thread, or before it starts.

Owns the endpoints. Each begins with a greeting (`transfer.ucx.greetings`).
"""

from kvcore.clock import Clock
from kvcore.errors import PeerUnreachableError, TransferError
from transfer.ucx.binding import Pointer, ffi
from transfer.ucx.context import UcxContext
from transfer.ucx.descriptor import UcxDescriptor
from transfer.ucx.endpoint import UcxEndpoint, Window
from transfer.ucx.greetings import Greetings
from transfer.ucx.limits import UcxLimits


class Connections:
    """Endpoints towards others, whom `greetings` asks for their segments."""

    def __init__(self, context: UcxContext, greetings: Greetings, clock: Clock, limits: UcxLimits) -> None:
        self._context = context
        self._library = context.library
        self._greetings = greetings
        self._clock = clock
        self._limits = limits
        self.window = Window(limits)
        self._endpoints: dict[str, UcxEndpoint] = {}
        self._closing: list[UcxEndpoint] = []
        self._on_error_callback = ffi.callback("void(void *, void *, ucs_status_t)", self._on_error)

    def __repr__(self) -> str:
        return f"<Connections endpoints={len(self._endpoints)} closing={len(self._closing)} {self._greetings!r}>"

    @property
    def connecting(self) -> bool:
        """Whether a peer has still to answer."""
        return any(endpoint.connecting for endpoint in self._endpoints.values())

    @property
    def closing(self) -> bool:
        """Whether UCX has still to let go of an endpoint."""
        return bool(self._closing)

    def lanes(self, segment_id: str) -> str:
        """Transports and devices in use for a segment (`tcp/lo`), or empty before the first batch. From any thread."""
        return next((one.lanes for one in list(self._endpoints.values()) if one.segment_id == segment_id), "")

    def ready(self, key: str) -> UcxEndpoint | None:
        """The endpoint for `key`, if its peer has confirmed the segment and nothing is wrong with it."""
        found = self._endpoints.get(key)
        return found if found is not None and found.confirmed and found.error is None else None

    def get(self, descriptor: UcxDescriptor, key: str) -> UcxEndpoint:
        """The endpoint for `key`, made and greeted if need be. Raises PeerUnreachableError."""
        found = self._endpoints.get(key)
        now = self._clock.now()
        if found is not None and found.error is None:
            found.used_at = now
            return found
        if found is not None:
            self._drop(key)
        if len(self._endpoints) >= self._limits.max_endpoints:
            self._make_room()
        endpoint = UcxEndpoint(self._context, descriptor, self._on_error_callback, now=now, window=self.window)
        self._endpoints[key] = endpoint
        if endpoint.error is None:
            self._greetings.begin(endpoint)
        return endpoint

    def fail_all(self, error: TransferError) -> None:
        """Give every endpoint up."""
        for endpoint in self._endpoints.values():
            endpoint.fail(error)

    def clean_up(self) -> None:
        """Close endpoints that failed, free those that UCX let go of, and messages that were sent."""
        for key in [key for key, one in self._endpoints.items() if one.error is not None]:
            self._drop(key)
        for endpoint in [one for one in self._closing if one.num_batches == 0 and one.closed()]:
            endpoint.release()
            self._closing.remove(endpoint)
        self._greetings.clean_up()

    def _make_room(self) -> None:
        idle = [key for key, one in self._endpoints.items() if not one.num_batches]
        if not idle:
            raise PeerUnreachableError(
                f"{self._limits.max_endpoints} connections are in use, and none is left for another segment"
            )
        self._drop(min(idle, key=lambda key: self._endpoints[key].used_at))

    def _drop(self, key: str) -> None:
        """Close an endpoint; `clean_up` frees it later. The greeting that it waits for is of no interest any more."""
        endpoint = self._endpoints.pop(key)
        endpoint.begin_close()
        self._closing.append(endpoint)
        self._greetings.forget(endpoint)

    # --- called by UCX, from within `progress` ---

    def _on_error(self, _: Pointer, handle: Pointer, status: int) -> None:
        for endpoint in self._endpoints.values():
            if endpoint.handle == handle:
                why = self._library.text(status)
                endpoint.fail(PeerUnreachableError(f"segment {endpoint.segment_id}: the connection broke: {why}"))
