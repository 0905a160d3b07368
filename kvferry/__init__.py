"""The front door: command line, cluster launcher, offline LLM, doctor, status, the demo.

Owns wiring and what a person sees. Serving code lives in the packages below.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvferry.offline.llm import LLM

__all__ = ["LLM", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`LLM`, imported when it is asked for."""
    if name == "LLM":
        from kvferry.offline.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
