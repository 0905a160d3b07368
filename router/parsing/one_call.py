"""Where an answer that may call one tool begins to call another. Pure."""

from router.parsing.dialects import AnswerParser
from router.parsing.events import CallBegin
from router.parsing.forced import ForcedParser


class SecondCall:
    """Of one answer. `parser`: its own."""

    def __init__(self, parser: AnswerParser | ForcedParser) -> None:
        self._parser = parser
        self._begun = 0

    def __repr__(self) -> str:
        return f"<SecondCall {self._begun} begun>"

    def feed(self, text: str) -> bool:
        """More of the answer. Whether a second call has begun."""
        events = self._parser.feed(text) if text else ()
        self._begun += sum(isinstance(event, CallBegin) for event in events)
        return self._begun > 1
