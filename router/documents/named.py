"""What is known of the documents of one prompt. Values only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from nodeapi.documents import Documents
from nodeapi.messages import EngineInfo

DocumentKind = Literal["field", "part", "separator"]
"""How a client has named them: in `documents`, as marked parts of a message, or by a separator between texts."""


@dataclass(frozen=True, slots=True)
class NamedDocuments:
    """Where they stand in the prompt's tokens, as in `nodeapi.documents.Documents`. `why`: they are computed as all
    other text is, and this is the reason; empty: nodes are told of them, with `k`."""

    kind: DocumentKind
    header: int = 0
    spans: Sequence[tuple[int, int]] = ()
    k: int = 0
    why: str = ""

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def told(self) -> Documents | None:
        """What nodes are told; None: nothing."""
        return None if self.why else Documents(header=self.header, spans=list(self.spans), k=self.k)


class PromptTokens(msgspec.Struct, frozen=True):
    """A prompt as tokens. `documents` None: it names none."""

    token_ids: list[int]
    documents: NamedDocuments | None = None


def why_refused(engine: EngineInfo | None) -> str:
    """Why a node with this engine takes no documents; empty: it does."""
    return engine.refuses_documents if engine is not None else "nothing is known of its engine"
