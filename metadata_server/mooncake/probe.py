"""One probe of a Mooncake client's port: the handshake message of its own kind that asks whether a peer is alive.

A connection that is closed without a word would be an error in the client's log; this one it answers in silence:
`{"status":"success"}`. Its listener takes one connection at a time, so we stay for no longer than that.
"""

import asyncio
import errno
import socket

from metadata_server.mooncake.keys import Address
from metadata_server.mooncake.owners import ProbeOutcome

_PROBE = 3
_BODY = bytes([_PROBE]) + b"{}"
_FRAME = len(_BODY).to_bytes(8, "little") + _BODY
_SILENT = {errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT}


async def probe(address: Address, timeout_s: float) -> ProbeOutcome:
    """Ask; a connection is an answer, whatever comes over it. Never raises."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(address.host, address.port)
    except ConnectionRefusedError:
        return ProbeOutcome.REFUSED
    except TimeoutError:
        return ProbeOutcome.SILENT
    except socket.gaierror as error:
        return ProbeOutcome.SILENT if error.errno == socket.EAI_NONAME else ProbeOutcome.UNKNOWN
    except (OSError, ValueError) as error:  # a host that cannot be one is a ValueError
        return ProbeOutcome.SILENT if getattr(error, "errno", None) in _SILENT else ProbeOutcome.UNKNOWN
    try:
        writer.write(_FRAME)
        async with asyncio.timeout(timeout_s):
            await reader.read()
    except (OSError, TimeoutError):
        pass
    finally:
        writer.close()
    return ProbeOutcome.ANSWERED
