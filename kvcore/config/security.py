"""The `security` of a cluster file: by what its processes know each other. Values only, never a secret."""

from typing import Annotated

import msgspec

from kvcore.config.fields import Seconds, Section, Text


class SecretConfig(Section, frozen=True, kw_only=True):
    """Where the secret is, one of these: 32 bytes or more in hex or base64, a line; one on a line before it is new, and
    signs."""

    file: Text | None = None
    """A file, by its path from the folder of the cluster file, that nobody but its owner and group can read. Read again
    when it changes. `kvferry secret new FILE` makes one."""
    env: Text | None = None
    """The name of an environment variable."""
    command: Annotated[list[Text], msgspec.Meta(min_length=1)] | None = None
    """A program and its arguments that prints it, run at start and, if `every_s` says so, again."""
    every_s: Seconds | None = None
    """How often a process runs the command again, beside its other work. One that fails changes nothing and is logged.
    Not set: at start alone."""


class PublicTextConfig(Section, frozen=True, kw_only=True):
    """A text that all tenants' prompts may begin with. One of these."""

    text: Text | None = None
    """The text itself."""
    file: Text | None = None
    """A file with it, by its path from the folder of the cluster file. Read at the router's start."""


class KeysConfig(Section, frozen=True, kw_only=True):
    """Where the API keys are. One of these."""

    file: Text | None = None
    """A file, by its path from the folder of the cluster file, with the keys' hashes. Read again when it changes.
    `kvferry keys create` writes it."""
    env: Text | None = None
    """The name of an environment variable with the text of such a file."""
    gateways: list[Text] = msgspec.field(default_factory=list)
    """Addresses of gateways of ours: of a request that comes from one of these the last entry of `X-Forwarded-For` is
    the client's address, by which wrong keys are counted."""
    public: list[PublicTextConfig] = msgspec.field(default_factory=list)
    """Texts whose leading chunks all tenants share, as a prompt's beginning or a chat's system message
    (docs/tenants.md). Nothing else is shared."""


class TlsConfig(Section, frozen=True, kw_only=True):
    """A certificate and its key (PEM), by paths from the cluster file's folder. Read again when they change, for new
    connections."""

    cert: Text
    """The certificate, and after it those that lead to a root which clients know."""
    key: Text
    """Its key, without a password."""


class ClusterTlsConfig(Section, frozen=True, kw_only=True):
    """PEM files, by paths from the cluster file's folder. Read again when they change, for new connections."""

    cert: Text
    """This process's certificate, for servers and clients, and after it those that lead to `ca`. It names the addresses
    at which the process is reached and, where `security.nodes` is given, the node (subjectAltName: IP and DNS).
    `{name}` in a path is the process's own: a node's, `router`, `metadata-server`, `client` for commands."""
    key: Text
    """Its key, without a password, in a file that nobody but its owner and group can read."""
    ca: Text
    """The certificates of who may issue them: a CA of this cluster's own, as whoever has one from it is let in."""


class SecurityConfig(Section, frozen=True, kw_only=True):
    """Who is trusted, and by what."""

    secret: SecretConfig | None = None
    """The cluster's secret. All processes of a cluster have the same. Without one a process listens on this machine
    alone, but for `open`."""
    tls: ClusterTlsConfig | None = None
    """Certificates by which processes know each other over HTTP, in place of proofs of the secret. What moves bytes and
    what signs chunks needs the secret."""
    keys: KeysConfig | None = None
    """API keys of tenants (docs/tenants.md). Not set: whoever reaches the router may use it. Needs a secret."""
    open: bool = False
    """Listen where other machines reach us though there is no secret: whoever does can use the cluster, read and write
    its cache and be one of its nodes. `kvferry doctor`, `kvferry status` and the log repeat it."""
    nodes: Annotated[list[Text], msgspec.Meta(min_length=1)] | None = None
    """Names that nodes may have. The metadata server refuses others, and those that `nodes` of its own file has at
    another address; with `security.tls` also a certificate that does not have the node's name. Not set: any name."""
