"""A Mooncake client in a process of its own: `mooncake_client.py NAME METADATA MASTER`, one command a line.

`put KEY TEXT` and `get KEY` are answered with a line each, as is the start: what Mooncake's `setup`, `put` and `get`
returned. `close` ends it in good order.
"""

import os
import sys

_LENT = 32 << 20
_BUFFER = 16 << 20


def main() -> None:
    """Until `close`, the end of the input, or a failed set-up."""
    from mooncake.store import MooncakeDistributedStore  # the package is only where its tests run

    name, metadata, master = sys.argv[1:]
    store = MooncakeDistributedStore()
    options = {
        "local_hostname": name,
        "metadata_server": metadata,
        "master_server_addr": master,
        "protocol": "tcp",
        "global_segment_size": str(_LENT),
        "local_buffer_size": str(_BUFFER),
    }
    code = store.setup(options)
    print(code, flush=True)
    for line in sys.stdin if code == 0 else ():
        command, *rest = line.split()
        if command == "close":
            break
        print(store.put(rest[0], rest[1].encode()) if command == "put" else store.get(rest[0]).decode(), flush=True)
    store.close()
    os._exit(0 if code == 0 else 1)  # its threads may outlive a set-up that failed


if __name__ == "__main__":
    main()
