"""Which version of kvferry this is."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def release() -> str:
    """As it was installed; empty: it runs from its sources."""
    try:
        return version("kvferry")
    except PackageNotFoundError:
        return ""
