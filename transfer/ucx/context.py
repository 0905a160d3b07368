"""One UCX context with its worker: opened, its memory registered, its handles given back.

Owns the handles and no thread: whoever opens it sees to it that one thread at a time calls UCX.
"""

from kvcore.errors import ConfigError
from transfer.ucx.binding import Pointer, UcxLibrary, ffi, open_context
from transfer.ucx.devices import UcxPlan, check_opened, read_resources

_FEATURES = 1 << 1 | 1 << 4 | 1 << 6  # RMA, wakeup, active messages
_THREAD_MODE_SERIALIZED = 1


class UcxContext:
    """Opening raises ConfigError that names the device or transport that is missing, and leaves nothing open.

    `resources`: `transport/device` of all that was opened. `event_fd`: readable once `arm` has succeeded and something
    came.
    """

    def __init__(self, library: UcxLibrary, plan: UcxPlan) -> None:
        self.library = library
        self._lib = library.lib
        self._mapped: list[Pointer] = []
        self._context = open_context(library, plan.options(), _FEATURES)
        try:
            self.resources = read_resources(library.printed("ucp_context_print_info", self._context))
            check_opened(plan, self.resources, library.build)
            self.worker = self._create_worker()
            self.event_fd = self._find_event_fd()
        except ConfigError:
            self._lib.ucp_cleanup(self._context)
            raise

    def __repr__(self) -> str:
        opened = ",".join(self.resources)
        return f"<UcxContext {self.library.build} resources={opened} regions={len(self._mapped)}>"

    @property
    def address(self) -> bytes:
        """The worker's address, for a descriptor."""
        found, size = ffi.new("void **"), ffi.new("size_t *")
        self.library.check(self._lib.ucp_worker_get_address(self.worker, found, size), "ucp_worker_get_address")
        try:
            return bytes(ffi.buffer(found[0], size[0]))
        finally:
            self._lib.ucp_worker_release_address(self.worker, found[0])

    def map_memory(self, region: memoryview) -> tuple[Pointer, int]:
        """Register (and for RDMA pin) memory until `close`: handle and address. Raises ConfigError."""
        buffer = ffi.from_buffer(region, require_writable=not region.readonly)
        params = ffi.new("ucp_mem_map_params_t *", {"field_mask": 0b11, "length": region.nbytes})
        params.address = ffi.cast("void *", buffer)
        handle = ffi.new("void **")
        self.library.check(
            self._lib.ucp_mem_map(self._context, params, handle),
            f"cannot register {region.nbytes} bytes (RDMA pins them: see `ulimit -l`)",
        )
        self._mapped.append(handle[0])
        return handle[0], int(ffi.cast("uintptr_t", buffer))

    def pack_rkey(self, handle: Pointer) -> bytes:
        """The remote key of registered memory."""
        packed, size = ffi.new("void **"), ffi.new("size_t *")
        self.library.check(self._lib.ucp_rkey_pack(self._context, handle, packed, size), "ucp_rkey_pack")
        try:
            return bytes(ffi.buffer(packed[0], size[0]))
        finally:
            self._lib.ucp_rkey_buffer_release(packed[0])

    def on_message(self, message: int, callback: Pointer) -> None:
        """Have UCX call `callback` for active messages with this id; the caller keeps it alive. Raises ConfigError."""
        handler = ffi.new("ucp_am_handler_param_t *", {"field_mask": 0b101, "id": message, "cb": callback})
        self.library.check(self._lib.ucp_worker_set_am_recv_handler(self.worker, handler), "active messages")

    def progress(self) -> bool:
        """Move everything on; whether anything moved. Calls the callbacks."""
        return bool(self._lib.ucp_worker_progress(self.worker))

    def arm(self) -> bool:
        """Have `event_fd` wake who sleeps on it. False: something has come meanwhile, so do not sleep."""
        return not self._lib.ucp_worker_arm(self.worker)

    def close(self) -> None:
        """Once, after every endpoint was closed: destroy the worker, unregister memory, close the context."""
        self._lib.ucp_worker_destroy(self.worker)
        for handle in self._mapped:
            self._lib.ucp_mem_unmap(self._context, handle)
        self._lib.ucp_cleanup(self._context)

    def _create_worker(self) -> Pointer:
        worker = ffi.new("void **")
        params = ffi.new("ucp_worker_params_t *", {"field_mask": 1, "thread_mode": _THREAD_MODE_SERIALIZED})
        self.library.check(self._lib.ucp_worker_create(self._context, params, worker), "ucp_worker_create")
        return worker[0]

    def _find_event_fd(self) -> int:
        found = ffi.new("int *")
        self.library.check(self._lib.ucp_worker_get_efd(self.worker, found), "ucp_worker_get_efd")
        return int(found[0])
