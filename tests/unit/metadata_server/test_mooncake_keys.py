"""Mooncake's keys and values: decoded, whose they are, where their owner listens."""

import pytest
from support.mooncake_dialect import HOST, NAME, RAM, RPC, ram, rpc

from kvcore.errors import InvalidRequestError
from metadata_server.mooncake.keys import Address, address_of, key_of, owned


@pytest.mark.parametrize(
    ("query", "key"),
    [
        (b"key=mooncake%2Frpc_meta%2F10.99.0.1%3A17777", RPC),
        (b"key=mooncake%2frpc_meta%2f10.99.0.1%3a17777", RPC),
        (b"key=mooncake/rpc_meta/10.99.0.1:17777", RPC),
        (b"x=1&key=a%2Bb+c%20d&key=e", "a+b c d"),
        (b"key=%C3%BC", "ü"),
        (b"key=+", ""),
        (b"key=", ""),
        (b"", ""),
        (b"monkey=1", ""),
    ],
)
def test_keys_are_decoded(query, key):
    assert key_of(query) == key


@pytest.mark.parametrize("query", [b"key=%FF", b"key=\xff"])
def test_a_key_that_is_no_text_is_refused(query):
    with pytest.raises(InvalidRequestError, match="UTF-8"):
        key_of(query)


def test_an_owner_has_two_keys_in_its_cluster():
    assert owned(RPC) == owned(RAM) == (RPC, RAM)
    for key in ("mooncake/a/b/ram/h:1", "mooncake/a/b/rpc_meta/h:1"):
        assert owned(key) == ("mooncake/a/b/rpc_meta/h:1", "mooncake/a/b/ram/h:1")
    assert owned("mooncake/nvmeof/x") is owned("mooncake/ram/") is owned("mooncake/ram/a/b") is owned("") is None


def test_values_say_where_their_owner_listens():
    assert address_of(RPC, rpc(16426)) == Address(HOST, 16426)
    assert address_of(RAM, ram(16267)) == Address(HOST, 16267)
    assert address_of(RAM, b'{"name":"%s","tcp_data_port":5}' % NAME.encode()) == Address(HOST, 5), "before 0.3.11"
    rdma = b'{"name":"%s","protocol":"rdma","devices":[],"buffers":[]}' % NAME.encode()
    for key, value in (
        (RAM, rdma),
        (RPC, b""),
        (RPC, b"no json"),
        (RPC, b'{"ip_or_host_name":"h","rpc_port":0}'),
        (RPC, b'{"ip_or_host_name":"h","rpc_port":65536}'),
        (RPC, b'{"ip_or_host_name":"","rpc_port":1}'),
        ("mooncake/nvmeof/x", rpc()),
    ):
        assert address_of(key, value) is None
