"""The check of a running cluster that this machine's processes will join: it is theirs, and their names are free."""

import asyncio

from kvcore.clock import SystemClock
from kvcore.config.servers import internal_url, secured_url
from kvcore.errors import ConfigError, MetadataProtocolError, MetadataUnavailableError
from kvcore.identity import ClusterIdentity
from kvcore.trust.opening import open_trust, trust_source
from kvferry.doctor.findings import Context, Finding
from kvferry.machine import is_local
from metadata_server.connect import connect_client, endpoints_of
from metadata_server.messages import NodesReply

_SUBJECT = "cluster"


def check_joining(context: Context) -> list[Finding]:
    """Ask the metadata server, if there is one yet. Blocking, as long as `metadata_server.timeout_s` at most."""
    config = context.config
    if not config.handoff.traits.has_store or config.metadata_server.port == 0:
        return []
    url = secured_url(config, endpoints_of(config.metadata_server).urls[0])
    try:
        reply = asyncio.run(_ask(context))
    except ConfigError:
        return []  # the secret cannot be had: another check says so
    except MetadataUnavailableError:
        return [Finding(_SUBJECT, True, f"no metadata server answers at {url} yet")]
    except MetadataProtocolError as error:
        remedy = "something else listens there, or of another version: correct metadata_server.host and .port"
        return [Finding(_SUBJECT, False, error.message, remedy)]
    names = ClusterIdentity(config.cluster, config.model.name)
    differs = names.difference(ClusterIdentity(reply.cluster, reply.model))
    if differs is not None:
        remedy = "correct metadata_server.host and .port, or take that cluster's file"
        return [Finding(_SUBJECT, False, f"the metadata server at {url} {differs}", remedy)]
    taken = list(_taken_names(context, reply))
    return taken or [Finding(_SUBJECT, True, f"{config.cluster!r} runs at {url}, nodes alive: {len(reply.nodes)}")]


async def _ask(context: Context) -> NodesReply:
    trust = open_trust(trust_source(context.config))
    client = connect_client(endpoints_of(context.config.metadata_server), SystemClock(), trust)
    try:
        return await client.nodes()
    finally:
        await client.aclose()


def _taken_names(context: Context, reply: NodesReply) -> list[Finding]:
    alive = {node.id: node.control_url for node in reply.nodes}
    findings = []
    for name, node in context.config.nodes.items():
        url = internal_url(context.config, node.host, node.port)
        if name in alive and alive[name] != url and (context.all_here or is_local(node.host)):
            wrong = f"{name} is alive at {alive[name]}, and in this file it is at {url}"
            findings.append(Finding(f"node {name}", False, wrong, "give one of the two another name, or stop that one"))
    return findings
