"""Two specs are compared by the names that a user knows, causes before what follows from them."""

import pytest
from msgspec.structs import asdict, replace
from support.router_fakes import spec

from kvcore.kv_parts import differing_parts, kv_parts

PLAIN = spec()
VLLM = replace(PLAIN, declared=(("block-size", "16"), ("kv-cache-dtype", "bfloat16")))
FP8 = (("block-size", "16"), ("kv-cache-dtype", "fp8_e4m3"))
OTHER_VALUES = {
    name: FP8[1:] if name == "declared" else f"{value}x" if isinstance(value, str) else value + 1
    for name, value in asdict(PLAIN).items()
}


def test_equal_specs_differ_in_nothing():
    assert differing_parts(PLAIN, spec()) == {}


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_each_field_that_changes_the_fingerprint_is_named(field):
    other = replace(PLAIN, **{field: OTHER_VALUES[field]})
    assert other.fingerprint != PLAIN.fingerprint
    ((name, (ours, theirs)),) = differing_parts(PLAIN, other).items()
    assert (ours, theirs) == (kv_parts(PLAIN).get(name, "not declared"), kv_parts(other)[name])


def test_arguments_are_named_and_not_what_follows_from_them():
    other = replace(VLLM, declared=FP8, dtype="uint8", layout_id="l", chunk_bytes=1)
    assert differing_parts(VLLM, other) == {"kv-cache-dtype": ("bfloat16", "fp8_e4m3")}
    assert "weights" in differing_parts(VLLM, replace(other, weights_digest="w2"))


def test_without_declared_arguments_the_size_of_a_chunk_is_named_only_if_it_alone_differs():
    assert differing_parts(PLAIN, replace(PLAIN, chunk_tokens=1, chunk_bytes=1)).keys() == {"kv.chunk_tokens"}
    assert differing_parts(PLAIN, replace(PLAIN, chunk_bytes=1)).keys() == {"chunk_bytes"}


def test_what_only_one_engine_declares_is_named():
    assert differing_parts(PLAIN, VLLM)["block-size"] == ("not declared", "16")
