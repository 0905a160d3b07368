"""A grammar in vLLM's words: the arguments of its StructuredOutputsParams, which its servers take as a field. Pure."""

import json

from nodeapi.grammars.grammar import Grammar, GrammarKind


def structured_outputs(grammar: Grammar) -> dict[str, object]:
    """What vLLM is told of a grammar, not of where it begins."""
    text: object = json.loads(grammar.text) if grammar.kind is GrammarKind.CHOICE else grammar.text
    match grammar.whitespace:
        case None:
            return {grammar.kind.value: text}
        case "":
            return {grammar.kind.value: text, "disable_any_whitespace": True}
        case pattern:
            return {grammar.kind.value: text, "whitespace_pattern": pattern}
