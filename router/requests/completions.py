"""The n answers of one request: their tokens so far, and how each ends. State and what follows from it alone."""

from collections.abc import Container, Iterable, Sequence

import msgspec

from nodeapi.messages import FinishReason, TokenDelta
from nodeapi.prompt_logprobs import PromptLogprobs
from router.requests.events import Emit


class Completion(msgspec.Struct):
    """One of the n answers. `tries`: legs begun since it last got anywhere."""

    tokens: list[int] = []
    finished: FinishReason | None = None
    tries: int = 0


class PromptScores:
    """How far the logprobs of the prompt's tokens have come, which every leg that begins anew tells from the start."""

    def __init__(self, prompt: Sequence[int], top: int) -> None:
        """`top`: so many others each."""
        self._prompt = prompt
        self._top = top
        self._next = 1

    @property
    def complete(self) -> bool:
        """Whether nothing more is to come."""
        return self._next >= len(self._prompt)

    def violation(self, piece: PromptLogprobs) -> str | None:
        """What is wrong with a piece; None: nothing."""
        if piece.start > self._next:
            return "not all logprobs of the prompt"
        return piece.problem(self._prompt, self._top)

    def take(self, piece: PromptLogprobs) -> PromptLogprobs | None:
        """What of it did not come before, from another leg."""
        new = piece.from_token(self._next) if piece.end > self._next else None
        self._next = max(self._next, piece.end)
        return new


class Completions:
    """All of them, by index. `scores`: of the prompt; None: none are wanted."""

    def __init__(
        self,
        n: int,
        max_tokens: int,
        min_tokens: int,
        end_token_ids: Container[int],
        *,
        logprobs: bool,
        scores: PromptScores | None,
    ) -> None:
        self._all = [Completion() for _ in range(n)]
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._end_token_ids = end_token_ids
        self._logprobs = logprobs
        self._scores = scores
        self.unfinished = set(range(n))
        """Indices that have not ended."""

    def __getitem__(self, index: int) -> Completion:
        return self._all[index]

    def __len__(self) -> int:
        return len(self._all)

    @property
    def num_tokens(self) -> int:
        """Emitted, over all."""
        return sum([len(completion.tokens) for completion in self._all])

    def protocol_violation(self, delta: TokenDelta, index: int, expected: Container[int]) -> str | None:
        """What is wrong with a delta for completion `index`, of a leg with these `expected`; None: nothing."""
        if delta.index not in expected:
            return f"a delta for index {delta.index}, which is not running"
        if (scores := self._scores) is not None:
            if not scores.complete and (delta.token_ids or delta.finish_reason not in (None, FinishReason.ABORT)):
                return "tokens before all logprobs of the prompt"
            if delta.prompt_logprobs is not None and (wrong := scores.violation(delta.prompt_logprobs)) is not None:
                return wrong
        elif delta.prompt_logprobs is not None:
            return "logprobs of the prompt that nobody asked for"
        completion = self._all[index]
        if completion.finished is None and len(delta.token_ids) > self._max_tokens - len(completion.tokens):
            return "more than max_tokens tokens"
        if self._logprobs and len(delta.logprobs or ()) != len(delta.token_ids):
            return "not one logprob a token"
        return None

    def tired(self, indices: Iterable[int], attempts: int) -> list[int]:
        """Those of them that were tried so often."""
        return [index for index in indices if self._all[index].tries >= attempts]

    def untry(self, indices: Iterable[int]) -> None:
        """Their last leg was no try."""
        for index in indices:
            self._all[index].tries -= 1

    def append(self, index: int, delta: TokenDelta, reason: FinishReason | None) -> Emit | None:
        """Add its tokens, and its end if `reason`. Nothing to emit where it has ended already, or the delta is empty,
        or has logprobs of the prompt that came before.

        Tokens set `tries` back: a long answer on a bad network goes on as long as it gets anywhere.
        """
        if delta.prompt_logprobs is not None and self._scores is not None:
            new = self._scores.take(delta.prompt_logprobs)
            return None if new is None else Emit(index, (), prompt_logprobs=new)
        completion = self._all[index]
        if completion.finished is not None or not (delta.token_ids or reason):
            return None
        completion.tokens += delta.token_ids
        completion.tries = 1
        if reason is not None:
            self.finish(index, reason)
        return Emit(index, delta.token_ids, delta.logprobs, reason, delta.stop_token_id)

    def finish_if_complete(self, index: int) -> list[Emit]:
        """End a completion whose leg died between its last token and its finish reason."""
        completion = self._all[index]
        tokens = completion.tokens
        if completion.finished is not None:
            return []
        if tokens and tokens[-1] in self._end_token_ids and len(tokens) > self._min_tokens:
            reason = FinishReason.STOP
        elif len(tokens) >= self._max_tokens:
            reason = FinishReason.LENGTH
        else:
            return []
        self.finish(index, reason)
        return [Emit(index, (), () if self._logprobs else None, reason)]

    def stop(self, index: int, num_tokens: int) -> bool:
        """It ends after its first `num_tokens` tokens; those after them, which came before they were read, are dropped.
        Returns whether it was unfinished."""
        was_unfinished = index in self.unfinished
        del self._all[index].tokens[num_tokens:]
        self.finish(index, FinishReason.STOP)
        return was_unfinished

    def finish(self, index: int, reason: FinishReason) -> None:
        """It has ended."""
        self._all[index].finished = reason
        self.unfinished.discard(index)

    def check_invariants(self) -> None:
        """Assert what must hold between any two events."""
        assert all(len(completion.tokens) <= self._max_tokens for completion in self._all)
        assert self.unfinished == {index for index, each in enumerate(self._all) if each.finished is None}
