"""An ASGI application behind a listener that asks for certificates of the cluster: whoever shows none is refused."""

from starlette.types import ASGIApp, Receive, Scope, Send

from kvcore.errors import ProofError
from kvcore.process.proven_app import Needs, all_but_open_paths, refuse
from kvcore.trust.certificates import PeerNames

NO_CERTIFICATE = "the request comes without a certificate of this cluster: give its sender the same security.tls"
PEER_NAMES = "kvferry.peer_names"
"""In a scope: the names of the certificate that its connection has shown, if there is one."""
SPEAKS_FOR = "kvferry.speaks_for"
"""In a scope: the nodes in whose names the request may speak, where certificates say so."""


class CertifiedApp:
    """Passes a request on whose connection has shown a certificate, and one that needs none. `names_matter`: who speaks
    in a node's name has it in his certificate. `why`: others are refused."""

    def __init__(
        self,
        app: ASGIApp,
        needs: Needs = all_but_open_paths,
        *,
        names_matter: bool = False,
        why: str = NO_CERTIFICATE,
    ) -> None:
        self._app, self._needs, self._names_matter, self._why = app, needs, names_matter, why

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        names: PeerNames | None = scope.get(PEER_NAMES)
        if scope["type"] == "http" and names is None and self._needs(scope):
            await refuse(ProofError(self._why), scope, send)
            return
        if self._names_matter:
            scope[SPEAKS_FOR] = names
        await self._app(scope, receive, send)
