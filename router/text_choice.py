"""One completion as it is read: its text, the counts of its tokens, and all with which the router ends it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from nodeapi.messages import FinishReason
from router.parsing.one_call import SecondCall
from router.parsing.reasoning_tokens import ReasoningTokens
from router.text.detokenizer import Detokenizer, StopChecker
from router.text.repetition import RepetitionWatch


@dataclass(slots=True)
class TextChoice:
    """One completion as it is read. `num_tokens` of it have been."""

    detokenizer: Detokenizer
    stops: StopChecker
    min_tokens: int
    stop_token_ids: Sequence[int]
    repetition: RepetitionWatch | None = None
    calls: SecondCall | None = None
    """Where one call is all that there may be."""
    reasoning: ReasoningTokens | None = None
    num_tokens: int = 0
    over: str = ""
    """Why it ends with the last token that was read; empty: it does not, or for another reason."""

    def read(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """(the text that these tokens complete, whether a stop string was found). Tokens after the one that completes
        the stop string, or with which the answer repeats itself, are not read, so that what counts does not depend on
        how many came at once; nor are those with which a call begins that may not be made."""
        counts = self.reasoning is not None and not self.reasoning.over
        if not (self.stops.stops or self.repetition or self.calls or counts):
            self.num_tokens += len(token_ids)
            return self.detokenizer.feed(token_ids), False
        pieces: list[str] = []
        stop_found = False
        for token_id in token_ids:
            self.num_tokens += 1
            text = self.detokenizer.feed([token_id])
            if self.reasoning is not None and not self.reasoning.over:
                self.reasoning.feed(text)
            text, stop_found = self.stops.feed(text, may_stop=self._may_stop)
            pieces.append(text)
            if self.repetition is not None and self.repetition.feed(token_id):
                self.over = "repetition"
            elif self.calls is not None and self.calls.feed(text):
                self.over = FinishReason.STOP.value
            if stop_found or self.over:
                break
        return "".join(pieces), stop_found

    @property
    def _may_stop(self) -> bool:
        return self.num_tokens > self.min_tokens
