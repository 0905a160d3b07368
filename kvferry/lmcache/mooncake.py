"""A Mooncake as LMCache's users write it -> `tiers.mooncake`. Each function writes one key into the draft. Pure.

LMCache takes these keys from `extra_config`, with `mooncake_` in front of Mooncake's own names before those without;
tutorials have them at the top. Mooncake's client knows the master and the devices by other names than LMCache gives it,
so only `mooncake_master_server_addr` reaches it there.
"""

from collections.abc import Mapping

from kvcore.config.parse import parse_byte_size
from kvcore.errors import ConfigError
from kvferry.cluster_text import size_text
from kvferry.lmcache.draft import Draft, Fate
from kvferry.lmcache.values import read_number
from kvferry.tier_options import mooncake_master

SCHEME = "mooncakestore"
_SECTION = "tiers.mooncake"
_LMCACHES_LENT = 3_355_443_200
_OTHER_NAMES = {"master_server_address": "master_server_addr", "device_name": "rdma_devices"}
"""LMCache's name -> Mooncake's, where they differ."""

Verdict = tuple[Fate, str]


def is_mooncake(settings: Mapping[str, object]) -> bool:
    """Whether `remote_url` names one."""
    return str(settings.get("remote_url", "")).strip().lower().startswith(f"{SCHEME}://")


def given(settings: Mapping[str, object], name: str) -> object:
    """What LMCache's key `name` says, in the spelling that counts most; None: it is nowhere."""
    own = _OTHER_NAMES.get(name, name)
    for key in (f"extra_config.mooncake_{own}", f"extra_config.{name}", name):
        if (value := settings.get(key)) is not None:
            return value
    return None


def master(draft: Draft, url: str) -> Verdict:
    """`remote_url`, and what it needs besides: the master, and what each node lends if no key says it."""
    try:
        named = mooncake_master(url, url)
    except ConfigError as error:
        if given(draft.settings, "master_server_address") is None:
            raise ValueError(error.message) from None
        named = ""
    address = str(given(draft.settings, "master_server_address") or named).strip()
    draft.put(f"{_SECTION}.master", address)
    said = f"{_SECTION}.master: {address}"
    if given(draft.settings, "global_segment_size") is None:
        draft.put(f"{_SECTION}.global_segment_size", size_text(_LMCACHES_LENT))
        said += f"; each node lends {size_text(_LMCACHES_LENT)}, as in LMCache where global_segment_size is not given"
    if address == named and given(draft.settings, "master_server_address") is None:
        said += " (LMCache itself takes no host and port from here: extra_config.mooncake_master_server_addr)"
    return Fate.MAPPED, said


def master_server_address(draft: Draft, value: object) -> Verdict:
    """Before the host and port of `remote_url`, which writes it."""
    if not is_mooncake(draft.settings):
        return _NO_MOONCAKE
    return Fate.MAPPED, f"{_SECTION}.master: {given(draft.settings, 'master_server_address')}"


def local_hostname(draft: Draft, value: object) -> Verdict:
    """As is. A loopback address is replaced where the master is elsewhere."""
    return _text(draft, "local_hostname")


def metadata_server(draft: Draft, value: object) -> Verdict:
    """As is."""
    return _text(draft, "metadata_server")


def global_segment_size(draft: Draft, value: object) -> Verdict:
    """Bytes that each node lends."""
    return _size(draft, "global_segment_size", "of each node")


def local_buffer_size(draft: Draft, value: object) -> Verdict:
    """Bytes of Mooncake's own buffer."""
    return _size(draft, "local_buffer_size", "of each node; kvferry needs none")


def transfer_timeout(draft: Draft, value: object) -> Verdict:
    """Seconds of a call."""
    if not is_mooncake(draft.settings):
        return _NO_MOONCAKE
    seconds = read_number(given(draft.settings, "transfer_timeout"))
    if not seconds:
        raise ValueError("0 s for a call; expected more")
    draft.put(f"{_SECTION}.timeout_s", seconds)
    return Fate.MAPPED, f"{_SECTION}.timeout_s: {seconds:g}"


def put_too(draft: Draft, key: str, value: object) -> str:
    """Of `protocol` and `rdma_devices`, which say something of kvferry's own transport first. Returns what to add."""
    if not is_mooncake(draft.settings):
        return ""
    draft.put(f"{_SECTION}.{key}", value)
    return f", and {_SECTION}.{key}"


_NO_MOONCAKE: Verdict = (Fate.IGNORED, f"of Mooncake, and remote_url is no {SCHEME}://HOST:PORT")


def _text(draft: Draft, name: str) -> Verdict:
    if not is_mooncake(draft.settings):
        return _NO_MOONCAKE
    text = str(given(draft.settings, name)).strip()
    if not text:
        return Fate.IGNORED, "empty"
    draft.put(f"{_SECTION}.{name}", text)
    return Fate.MAPPED, f"{_SECTION}.{name}: {text}"


def _size(draft: Draft, name: str, remark: str) -> Verdict:
    if not is_mooncake(draft.settings):
        return _NO_MOONCAKE
    value = given(draft.settings, name)
    if str(value).strip() == "0":
        return Fate.MAPPED, f"{_SECTION}.{name} is not set: none"
    try:
        size = parse_byte_size(value)
    except ValueError as error:
        raise ValueError(f"{value!r}: {error}") from None
    draft.put(f"{_SECTION}.{name}", size_text(size))
    return Fate.MAPPED, f"{_SECTION}.{name}: {size_text(size)}, {remark}"
