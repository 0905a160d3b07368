"""libucp through cffi in ABI mode: declarations, loading, versions, and statuses as errors. Knows no transfer.

Needs no compiler and no UCX headers: what is declared here has kept its layout since UCX 1.10. `ucs_status_t` is a
packed one-byte enum, hence `signed char`.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi

from kvcore.errors import ConfigError, PeerUnreachableError

Pointer = Any
"""A cffi pointer; cffi has no types."""

DEFAULT_LIBRARY = "libucp.so.0"
OLDEST = (1, 13)
"""Older ones report no error of a peer over TCP."""
IN_PROGRESS = 1
_REQUESTED_API = (1, 10)
_LOWEST_STATUS = -100

ffi = cffi.FFI()
ffi.cdef("""
typedef signed char ucs_status_t;
typedef struct { uint64_t field_mask, features; size_t request_size; void *request_init, *request_cleanup;
    uint64_t tag_sender_mask; int mt_workers_shared; size_t estimated_num_eps, estimated_num_ppn; const char *name;
    size_t node_local_id; } ucp_params_t;
typedef struct { uint64_t field_mask; int thread_mode; unsigned long cpu_mask[16]; unsigned events; void *user_data;
    int event_fd; uint64_t flags; const char *name; size_t am_alignment; uint64_t client_id; } ucp_worker_params_t;
typedef struct { uint64_t field_mask; const void *address; int err_mode;
    void (*err_cb)(void *, void *, ucs_status_t); void *err_arg; void *user_data; unsigned flags;
    const void *sockaddr; unsigned sockaddr_length; void *conn_request; const char *name; const void *local_sockaddr;
    unsigned local_sockaddr_length; } ucp_ep_params_t;
typedef struct { uint64_t field_mask; void *address; size_t length; unsigned flags, prot; int memory_type;
    const void *exported_memh_buffer; } ucp_mem_map_params_t;
typedef struct { uint32_t op_attr_mask, flags; void *request; void *cb; uint64_t datatype; void *user_data;
    void *reply_buffer; int memory_type; void *recv_info; void *memh; } ucp_request_param_t;
typedef struct { uint64_t recv_attr; void *reply_ep; } ucp_am_recv_param_t;
typedef ucs_status_t (*ucp_am_recv_callback_t)(void *, const void *, size_t, void *, size_t,
    const ucp_am_recv_param_t *);
typedef struct { uint64_t field_mask; unsigned id; uint32_t flags; ucp_am_recv_callback_t cb; void *arg;
    } ucp_am_handler_param_t;

ucs_status_t ucp_config_read(const char *, const char *, void **);
ucs_status_t ucp_config_modify(void *, const char *, const char *);
void ucp_config_release(void *);
ucs_status_t ucp_init_version(unsigned, unsigned, const ucp_params_t *, const void *, void **);
void ucp_cleanup(void *);
void ucp_context_print_info(void *, void *);
void ucp_get_version(unsigned *, unsigned *, unsigned *);
const char *ucp_get_version_string(void);

ucs_status_t ucp_worker_create(void *, const ucp_worker_params_t *, void **);
void ucp_worker_destroy(void *);
ucs_status_t ucp_worker_get_address(void *, void **, size_t *);
void ucp_worker_release_address(void *, void *);
unsigned ucp_worker_progress(void *);
ucs_status_t ucp_worker_get_efd(void *, int *);
ucs_status_t ucp_worker_arm(void *);
ucs_status_t ucp_worker_set_am_recv_handler(void *, const ucp_am_handler_param_t *);

ucs_status_t ucp_ep_create(void *, const ucp_ep_params_t *, void **);
void *ucp_ep_close_nbx(void *, const ucp_request_param_t *);
void *ucp_ep_flush_nbx(void *, const ucp_request_param_t *);
void ucp_ep_print_info(void *, void *);
ucs_status_t ucp_ep_rkey_unpack(void *, const void *, void **);
void ucp_rkey_destroy(void *);

ucs_status_t ucp_mem_map(void *, const ucp_mem_map_params_t *, void **);
ucs_status_t ucp_mem_unmap(void *, void *);
ucs_status_t ucp_rkey_pack(void *, void *, void **, size_t *);
void ucp_rkey_buffer_release(void *);

void *ucp_put_nbx(void *, const void *, size_t, uint64_t, void *, const ucp_request_param_t *);
void *ucp_get_nbx(void *, void *, size_t, uint64_t, void *, const ucp_request_param_t *);
void *ucp_am_send_nbx(void *, unsigned, const void *, size_t, const void *, size_t, const ucp_request_param_t *);
ucs_status_t ucp_request_check_status(void *);
void ucp_request_free(void *);

const char *ucs_status_string(ucs_status_t);
ucs_status_t ucs_global_opts_set_value(const char *, const char *);
void ucs_debug_disable_signals(void);

void *open_memstream(char **, size_t *);
int fclose(void *);
void free(void *);
""")


@dataclass(frozen=True, slots=True)
class UcxLibrary:
    """A loaded libucp. `lib` has the functions declared above."""

    lib: Pointer
    path: str
    version: tuple[int, int, int]

    @property
    def build(self) -> str:
        """For people: version and where it came from."""
        return f"UCX {'.'.join(map(str, self.version))} ({self.path})"

    def text(self, status: int) -> str:
        """What a status means."""
        return _string(self.lib.ucs_status_string(status))

    def check(self, status: int, what: str) -> None:
        """Raise ConfigError unless `status` is UCS_OK: for what is done at start-up."""
        if status:
            raise ConfigError(f"{self.build}: {what}: {self.text(status)}", param="transport.kind")

    def check_peer(self, status: int, what: str) -> None:
        """Raise PeerUnreachableError unless `status` is UCS_OK."""
        if status:
            raise PeerUnreachableError(f"{what}: {self.text(status)}")

    def status_of(self, request: Pointer) -> int | None:
        """What an operation that returned `request` is by now: None under way, 0 done, else its status. Not freed."""
        value = int(ffi.cast("intptr_t", request))
        if _LOWEST_STATUS < value <= 0:
            return value
        status = int(self.lib.ucp_request_check_status(request))
        return None if status == IN_PROGRESS else status

    def free(self, request: Pointer) -> None:
        """Give a request back to UCX, if it is one."""
        value = int(ffi.cast("intptr_t", request))
        if not _LOWEST_STATUS < value <= 0:
            self.lib.ucp_request_free(request)

    def printed(self, function: str, handle: Pointer) -> str:
        """What one of UCX's `*_print_info` functions writes about `handle`."""
        libc = ffi.dlopen(None)
        text, size = ffi.new("char **"), ffi.new("size_t *")
        stream = libc.open_memstream(text, size)
        if stream == ffi.NULL:
            return ""
        getattr(self.lib, function)(handle, stream)
        libc.fclose(stream)
        try:
            return _string(text[0])
        finally:
            libc.free(text[0])


@functools.cache
def load_library(path: str | None = None) -> UcxLibrary:
    """Load libucp (the system's, or that of `path`), once a process: UCX stays loaded to its end.

    Raises ConfigError when it is not there, too old, or not a libucp.
    """
    name = path or DEFAULT_LIBRARY
    try:
        lib = ffi.dlopen(name)
        numbers = [ffi.new("unsigned *") for _ in range(3)]
        lib.ucp_get_version(*numbers)
        version = (int(numbers[0][0]), int(numbers[1][0]), int(numbers[2][0]))
        lib.ucs_debug_disable_signals()  # it would take over SIGSEGV and others to print its own backtrace
        lib.ucs_global_opts_set_value(b"LOG_LEVEL", b"fatal")  # it logs to stdout; what fails we say ourselves
    except (OSError, AttributeError) as error:
        raise ConfigError(
            f"transport.kind: ucx needs libucp, and {name} cannot be used: {error}; install libucx0 (Debian, Ubuntu), "
            "ucx (Fedora, RHEL) or DOCA-OFED, or name the file in transport.ucx_library",
            param="transport.kind",
        ) from error
    if Path(name).parent.name.endswith(".libs"):
        # A wheel's EFA module loads the system's libibverbs beside its own, and the process crashes when it ends.
        lib.ucs_global_opts_set_value(b"MODULES", b"^efa")
    library = UcxLibrary(lib, name, version)
    if version[:2] < OLDEST:
        raise ConfigError(f"{library.build} is older than {'.'.join(map(str, OLDEST))}", param="transport.kind")
    return library


def open_context(library: UcxLibrary, options: dict[str, str], features: int) -> Pointer:
    """ucp_init with `options` (names without UCX_) over what the environment says. Raises ConfigError.

    UCX 1.13 takes a transport's option under its full name (`TCP_TX_SEG_SIZE`) and ignores it: it looks for the name
    without the transport. UCX 1.23 knows the full name alone.
    """
    lib = library.lib
    config = ffi.new("void **")
    library.check(lib.ucp_config_read(ffi.NULL, ffi.NULL, config), "ucp_config_read")
    try:
        for name, value in options.items():
            library.check(lib.ucp_config_modify(config[0], name.encode(), value.encode()), f"option {name}={value}")
            if name.startswith("TCP_"):
                lib.ucp_config_modify(config[0], name.removeprefix("TCP_").encode(), value.encode())
        params = ffi.new("ucp_params_t *", {"field_mask": 1, "features": features})
        context = ffi.new("void **")
        library.check(lib.ucp_init_version(*_REQUESTED_API, params, config[0], context), f"ucp_init with {options}")
    finally:
        lib.ucp_config_release(config[0])
    return context[0]


def _string(pointer: Pointer) -> str:
    return bytes(ffi.string(pointer)).decode(errors="replace")
