"""The parts of a KVSpec by the names that a user knows, and which of them differ between two specs. Pure."""

import msgspec

from kvcore.types import KVSpec

_NAMES = {
    "model_id": "model.name",
    "weights_digest": "weights",
    "tokenizer_digest": "tokenizer",
    "attention": "config.json",
    "dtype": "kv dtype",
    "chunk_tokens": "kv.chunk_tokens",
    "tp_size": "tensor-parallel-size",
}
"""Of fields whose own names are not what a user sets."""
_MEASURED = frozenset({"num_layers", "num_kv_heads", "head_dim", "kv dtype", "layout_id", "chunk_bytes"})
"""Fields that follow from the arguments: where an engine declares those, they alone are named."""
_ABSENT = "not declared"


def kv_parts(spec: KVSpec) -> dict[str, str]:
    """All that the fingerprint is made of, name -> value: the spec's fields, then what its engine declares."""
    fields = {name: value for name, value in msgspec.structs.asdict(spec).items() if name != "declared"}
    return {_NAMES.get(name, name): str(value) for name, value in fields.items()} | dict(spec.declared)


def differing_parts(one: KVSpec, other: KVSpec) -> dict[str, tuple[str, str]]:
    """Name -> the values of `one` and `other`, of the parts that differ: causes, without what only follows from them.
    Empty if and only if the specs are equal.

    1. A declared argument differs: the measured fields, which follow from the arguments, are left out.
    2. Otherwise all parts that differ are named, `chunk_bytes` only if it alone does.
    """
    ours, theirs = kv_parts(one), kv_parts(other)
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if set(names) & {name for name, _ in one.declared + other.declared}:
        names = [name for name in names if name not in _MEASURED]
    elif len(names) > 1:
        names = [name for name in names if name != "chunk_bytes"]
    return {name: (ours.get(name, _ABSENT), theirs.get(name, _ABSENT)) for name in names}


def describe_difference(one: KVSpec, other: KVSpec) -> str:
    """What differs, for people: each name with the value of `one` against that of `other`, long ones shortened."""
    parts = differing_parts(one, other).items()
    return "; ".join(f"{name} {_shown(ours)} against {_shown(theirs)}" for name, (ours, theirs) in parts)


def _shown(value: str, longest: int = 40) -> str:
    return value or "none" if len(value) <= longest else f"{value[:12]}..."
