"""The tokens that end a completion, whatever its text."""

import msgspec

from nodeapi.sampling import SamplingParams
from router.nodes.cluster import Cluster


class EndTokens(msgspec.Struct):
    """Of a request. Looked up when one is asked of: only where a leg dies behind the last token."""

    cluster: Cluster
    decoder: str
    sampling: SamplingParams

    def __contains__(self, token: object) -> bool:
        if token in self.sampling.stop_token_ids:
            return True
        return not self.sampling.ignore_eos and token in self.cluster.eos_token_ids(self.decoder)
