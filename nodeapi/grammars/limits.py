"""Bounds of what a grammar may cost. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What is over one of these is refused before it is compiled, or while it is."""

    max_chars: int = 200_000
    """Of a grammar's text."""
    max_nesting: int = 64
    """Of objects and arrays in a JSON schema or a structural tag, as vLLM has it."""
    max_members: int = 1_000
    """Of one object in either: the time to compile one of optional properties grows with the square of their number."""
    multiples: int = 10_000
    """Least common multiple of all `multipleOf` of one value: compiling takes 35 µs for each of so many remainders.
    Those of different values are looked at one after the other: ten times as many in all."""
    compile_s: float = 10.0
    """For one grammar, its wait for a thread included."""
    threads: int = 1
    """That compile."""
    max_waiting: int = 64
    """Grammars that are being compiled, or wait for it."""
    max_kept: int = 128
    """Compiled ones, for requests to come; the least recently used go first."""
    parser_fuel: int = 1_000_000
    """What compiling may take, in llguidance's `initial_lexer_fuel`; the time of one grammar grows with it."""
    step_fuel: int = 200_000
    """What one mask may take, in its `step_lexer_fuel`."""
    step_items: int = 5_000
    """And in its `step_max_items`. A grammar that reads one text in many ways takes up to a second a mask with so many,
    with 20,000 minutes; an object of 1,000 optional properties takes 4,000."""
    lexer_states: int = 50_000
    """Of one answer: 1 to 2 kB each."""
    row_items: int = 10_000
    """Of one place in a grammar: an object of so many optional properties has four each."""
    grammar_symbols: int = 200_000
    """Of one grammar."""
