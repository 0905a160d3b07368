"""LoRA adapters as nodes tell of them. A request names one in its salt (`kvcore.chunk_keys`)."""

import msgspec


class ServedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """One that an engine serves. `identity`: as `adapter_identity` has it: a request whose salt names it is computed
    with this adapter. `path`: where it came from, for people."""

    name: str
    identity: str
    path: str = ""
