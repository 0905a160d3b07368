"""YAML as people mean it: SafeLoader without its traps. One error for whatever is wrong with a text. Pure.

PyYAML reads YAML 1.1, in which `010` is 8 and `22:16` is 1336. Both are refused, as are keys that are given twice.
"""

from collections.abc import Hashable

import yaml
from yaml.constructor import ConstructorError

_MAX_DIGITS = 4000
"""Of a whole number; Python refuses to convert some more."""


class YAMLTextError(ValueError):
    """A text that is not YAML, or means something else than it looks like. Its text: ` at line 1, column 2: why`."""


def read_yaml(text: str) -> object:
    """The text's value: dicts, lists and scalars. Raises YAMLTextError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise YAMLTextError(f"{where}: {error.problem}") from error
    except RecursionError:
        raise YAMLTextError(": its brackets are nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        raise YAMLTextError(f": {error}") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what YAML 1.1 takes and nobody means."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        """As SafeLoader's; a key given twice would silently be the last one's value, and lose a node."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # SafeLoader says what is wrong with it
            if key_node.value in seen:
                raise ConstructorError(None, None, f"{key_node.value} given twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_plain_int(self, node: yaml.ScalarNode) -> int:
        """As SafeLoader's, but neither octal by a leading 0, nor sexagesimal by colons, nor thousands of digits."""
        digits = str(node.value).lstrip("+-")
        if ":" in digits or (len(digits) > 1 and digits[0] == "0" and digits[1] not in "xb"):
            told = f"{node.value} is a number to base {60 if ':' in digits else 8} in YAML"
            raise ConstructorError(None, None, f"{told}; write it in decimal, or in quotes", node.start_mark)
        if len(digits) > _MAX_DIGITS:
            raise ConstructorError(None, None, f"a whole number of {len(digits)} digits", node.start_mark)
        return int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_plain_int)
