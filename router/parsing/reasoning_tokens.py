"""How many tokens of an answer are its reasoning, token by token, so that it does not depend on how they came. Pure."""

from collections import deque

from router.parsing.dialects import AnswerParser


class ReasoningTokens:
    """Of one answer. `parser`: its own. Those count whose text begins between the marks, white space there too, as vLLM
    counts them; a token without text, such as the first bytes of a character, begins where the next one's text does."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self._read = 0
        """Characters so far."""
        self._begins: deque[int] = deque()
        """Of tokens of which is not known yet what they are: they may begin a mark."""
        self.count = 0

    def __repr__(self) -> str:
        return f"<ReasoningTokens {self.count}>"

    @property
    def over(self) -> bool:
        """Nothing that follows can be reasoning."""
        return self._parser.thought_over

    def feed(self, text: str) -> None:
        """The next token, which adds this text."""
        self._begins.append(self._read)
        self._read += len(text)
        if text:
            self._parser.feed(text)
            self._settle(self._parser.position)

    def end(self) -> None:
        """The answer is over."""
        self._parser.end()
        self._settle(self._read + 1)

    def _settle(self, until: int) -> None:
        """What begins before that character."""
        thoughts = self._parser.thoughts
        while self._begins and self._begins[0] < until:
            begin = self._begins.popleft()
            while thoughts and thoughts[0].end is not None and thoughts[0].end <= begin:
                thoughts.popleft()
            self.count += bool(thoughts) and thoughts[0].begin <= begin
