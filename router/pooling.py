"""vLLM servers asked what only they know: what a client sends goes to one as it is, and so comes its answer."""

from kvcore.errors import ModelNotFoundError, NodeUnavailableError
from router.nodes.cluster import Cluster
from router.nodes.vllm_client import VllmClient


class PlainPooling:
    """`PoolingServers` over the servers of a cluster that are up, in turn; another one where one cannot be reached."""

    def __init__(self, client: VllmClient, cluster: Cluster, timeout_s: float) -> None:
        self._client = client
        self._cluster = cluster
        self._timeout_s = timeout_s
        self._turn = 0

    async def ask(self, path: str, body: bytes) -> bytes:
        """See PoolingServers. ModelNotFoundError where their model does not pool, or is not the one asked for."""
        view = self._cluster.view()
        nodes = sorted(node.id for node in (*view.decoders, *view.prefillers))
        self._turn += 1
        failed: NodeUnavailableError | None = None
        for number in range(len(nodes)):
            node = self._cluster.nodes[nodes[(self._turn + number) % len(nodes)]]
            try:
                return await self._client.hand_on(node.url, path, body, timeout_s=self._timeout_s)
            except NodeUnavailableError as error:
                failed = error
            except ModelNotFoundError as error:
                text = f"{path}: the servers behind this router do not serve it, or not this model: {error.message}"
                raise ModelNotFoundError(text, param="model") from error
        raise failed or NodeUnavailableError(self._cluster.why_no_decoder())
