"""Whether a chat's answer may call tools, and how its text is read then."""

from collections.abc import Mapping, Sequence

from router.api.fields.chat_tools import Tool
from router.api.fields.checks import refuse, require
from router.parsing.dialects import Dialect
from router.requests.spec import AnswerReading


def may_call(tools: Sequence[Tool] | None, choice: str | Mapping[str, object] | None) -> bool:
    """Whether the model may call one. Raises InvalidRequestError for what is not to be had."""
    if isinstance(choice, Mapping) or choice == "required":
        refuse("tool_choice", True)
    require(choice in (None, "none", "auto"), "tool_choice", "is none or auto")
    return bool(tools) and choice != "none"


def reading_of(
    tools: Sequence[Tool] | None, *, dialect: Dialect | None, shows_reasoning: bool, one_call: bool, continues: bool
) -> AnswerReading | None:
    """`tools`: those that may be called. Raises InvalidRequestError where nobody can tell calls from text."""
    if dialect is None:
        text = "cannot be used with this model: its chat template speaks no known dialect; model.parser names one"
        require(not tools, "tools", text)
        return None
    schemas = {tool.function.name: tool.function.parameters or {} for tool in tools} if tools else None
    return AnswerReading(dialect, schemas, shows_reasoning, one_call, continues)
