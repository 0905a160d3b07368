"""Grammars of requests, checked before any token: a wrong one is the client's fault, and it is told so by its field."""

from kvcore.config.schema import ClusterConfig, VllmEngineConfig
from kvcore.errors import InvalidRequestError
from nodeapi.grammars.compiler import Grammars
from nodeapi.grammars.grammar import Grammar
from nodeapi.grammars.source import check_text
from router.text.tokenizer import Tokenizer


class GrammarChecks:
    """`grammars`: compiles them as the engines do. None: the engines have other libraries, which say before their first
    token what they do not take; only what holds for all is checked."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars

    def __repr__(self) -> str:
        return f"<GrammarChecks {self._grammars or 'of texts'}>"

    async def check(self, grammar: Grammar, param: str, owner: str = "") -> None:
        """`owner`: whose it is, for the turns. Raises InvalidRequestError with the field's name and what is wrong,
        OverloadedError while too many others are looked at."""
        try:
            if self._grammars is None:
                check_text(grammar)
            else:
                await self._grammars.matcher(grammar, owner)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{param}: {error.message}", param=param) from error

    def close(self) -> None:
        """What waits is never compiled."""
        if self._grammars is not None:
            self._grammars.close()


def open_checks(config: ClusterConfig, tokenizer: Tokenizer) -> GrammarChecks:
    """For the cluster's engines. Close them in the end."""
    if config.engine is None or isinstance(config.engine, VllmEngineConfig):
        return GrammarChecks(None)
    return GrammarChecks(Grammars(tokenizer.vocabulary, ()))
