"""Batches of vLLM's KV events (vllm/distributed/kv_events.py), decoded: msgpack `[ts, [events], rank]`. Pure.

Events are maps with their type in `type`; older servers send arrays that begin with it. Hashes are integers or bytes.
"""

import msgspec

from router.routing.told import AllBlocksCleared, BlockRemoved, BlockStored, CacheEvent

_FIELDS = {kind.__name__: kind.__struct_fields__ for kind in (BlockStored, BlockRemoved, AllBlocksCleared)}


def decode_events(payload: bytes) -> list[CacheEvent]:
    """The events of one batch; those of kinds that we do not know are left out. Raises ValueError or MsgspecError."""
    match msgspec.msgpack.decode(payload):
        case [int() | float(), [*raw], *_]:
            return [event for each in raw if (event := _event(each)) is not None]
    raise ValueError("a batch is [ts, [events], rank]")


def _event(raw: object) -> CacheEvent | None:
    match raw:
        case [str(tag), *values]:
            fields: dict[object, object] = {"type": tag}
            fields.update(zip(_FIELDS.get(tag, ()), values, strict=False))
        case {"type": str(tag)} if isinstance(raw, dict):
            fields = raw
        case _:
            raise ValueError("an event is a map or an array with its type")
    return msgspec.convert(fields, CacheEvent) if tag in _FIELDS else None
