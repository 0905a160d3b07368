"""Which chunk continues which, of all that are there: a prefix never goes before its continuation.

Without its prefix a chunk is of no use to anybody. Who continues whom is not in a key: it is learned from the order of
keys in one call (`link`), and unknown of what was found after a restart until somebody asks for it. Invariant: no chunk
comes before itself, whatever is said, so that there is always one that may go.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic

from kvcore.eviction.base import K


class Chains(Generic[K]):
    """Each call is O(1), but for a chunk that comes back after what continues it: that walks up to its beginning."""

    def __init__(self, max_expected: int = 65_536) -> None:
        """`max_expected`: links known of chunks that are still to come; the oldest are forgotten."""
        self._parents: dict[K, K | None] = {}
        """Of all that are there; None: unknown, or the first of a prompt."""
        self._children: dict[K, int] = {}
        """Continuations that are there, of chunks that are there or not."""
        self._expected: OrderedDict[K, K] = OrderedDict()
        self._max_expected = max_expected

    def __repr__(self) -> str:
        return f"<Chains of {len(self._parents)} chunks, {len(self._children)} with continuations>"

    def is_prefix(self, key: K) -> bool:
        """Whether a continuation is there that would be lost with this."""
        return key in self._children

    def came(self, key: K) -> None:
        """A chunk is there."""
        self._parents[key] = None
        parent = self._expected.pop(key, None)
        if parent is not None:
            self._join(key, parent)

    def left(self, key: K) -> K | None:
        """It is gone. Returns the chunk that nothing continues any more; None: there is none."""
        parent = self._parents.pop(key)
        if parent is None:
            return None
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
            return None
        del self._children[parent]
        return parent

    def link(self, keys: Sequence[K]) -> None:
        """Each continues the one before it."""
        unknown = [at for at, parent in enumerate(map(self._parents.get, keys)) if parent is None]
        for at in reversed(unknown):  # from the end, so that none has been joined to what came before it
            if at == 0:
                continue
            if keys[at] in self._parents:
                self._join(keys[at], keys[at - 1])
                continue
            self._expected[keys[at]] = keys[at - 1]
            if len(self._expected) > self._max_expected:
                self._expected.popitem(last=False)

    def check(self) -> None:
        """Assert every invariant. For tests."""
        children: dict[K, int] = {}
        for parent in self._parents.values():
            if parent is not None:
                children[parent] = children.get(parent, 0) + 1
        assert children == self._children
        for key in self._parents:
            seen, up = {key}, self._parents[key]
            while up is not None:
                assert up not in seen, "a chunk continues itself"
                seen.add(up)
                up = self._parents.get(up)

    def _join(self, key: K, parent: K) -> None:
        children = self._children
        if key in children:  # what it continues may be what continues it, as far as what was said goes
            up: K | None = parent
            while up is not None and up != key:
                up = self._parents.get(up)
            if up is not None:
                return
        elif key == parent:
            return
        self._parents[key] = parent
        children[parent] = children.get(parent, 0) + 1
