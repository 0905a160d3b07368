"""Which chunk continues which, of all that are there: a prefix never goes before its continuation.

Each segment has one of its own: one that waited for what lies elsewhere could be full of prefixes that may not go, and
give no room to what is wanted now.

Without its prefix a chunk is of no use to anybody. Who continues whom is not in a key: it is learned from the order of
keys in one call (`link`), and unknown of what was found after a restart until somebody asks for it. Several evictors
may share one `Chains`; a chunk may then be there several times. Invariant: no chunk comes before itself, whatever is
said, so that there is always one that may go.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic

from kvcore.eviction.base import K


class Chains(Generic[K]):
    """Each call is O(1), but for a chunk that comes back after what continues it: that walks up to its beginning."""

    def __init__(self, max_expected: int = 65_536) -> None:
        """`max_expected`: links known of chunks that are still to come; the oldest are forgotten."""
        self._parents: dict[K, K | None] = {}
        """Of all that are there; None: unknown, or the first of a prompt."""
        self._copies: dict[K, int] = {}
        """Of those that are there more than once."""
        self._children: dict[K, int] = {}
        """Continuations that are there, of chunks that are there or not."""
        self._waiting: dict[K, list[Callable[[K], None]]] = {}
        self._expected: OrderedDict[K, K] = OrderedDict()
        self._max_expected = max_expected

    def __repr__(self) -> str:
        return f"<Chains of {len(self._parents)} chunks, {len(self._children)} with continuations>"

    def is_prefix(self, key: K) -> bool:
        """Whether a continuation is there that would be lost with this, its last copy."""
        return key in self._children and key not in self._copies

    def came(self, key: K, parent: K | None = None) -> None:
        """One more copy of a chunk is there. Of several the first of a prompt is to come first."""
        if parent is None:
            parent = self._expected.pop(key, None)
        elif key not in self._parents and key not in self._children and key != parent:  # most are
            self._parents[key] = parent
            self._children[parent] = self._children.get(parent, 0) + 1
            return
        if key in self._parents:
            self._copies[key] = self._copies.get(key, 1) + 1
            self._wake(key)
            if self._parents[key] is not None:
                return
        else:
            self._parents[key] = None
        if parent is not None:
            self._join(key, parent)

    def left(self, key: K) -> None:
        """One copy is gone."""
        copies = self._copies.get(key)
        if copies is not None:
            if copies == 2:
                del self._copies[key]
            else:
                self._copies[key] = copies - 1
            return
        parent = self._parents.pop(key)
        if parent is None:
            return
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
        else:
            del self._children[parent]
            self._wake(parent)

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

    def wait(self, key: K, tell: Callable[[K], None]) -> None:
        """Call `tell` once, when this is no prefix any more."""
        waiting = self._waiting.setdefault(key, [])
        if tell not in waiting:
            waiting.append(tell)

    def check(self) -> None:
        """Assert every invariant. For tests."""
        children: dict[K, int] = {}
        for parent in self._parents.values():
            if parent is not None:
                children[parent] = children.get(parent, 0) + 1
        assert children == self._children
        assert all(copies > 1 and key in self._parents for key, copies in self._copies.items())
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

    def _wake(self, key: K) -> None:
        for tell in self._waiting.pop(key, ()):
            tell(key)
