"""Whether a chat's answer may call tools, which it must call, and how its text is read then."""

from collections.abc import Mapping, Sequence

from router.api.fields.chat_tools import Tool
from router.api.fields.checks import require
from router.api.fields.structured import AskedGrammar
from router.parsing.call_forms import CallForm, Schemas, forced_arguments, forced_calls, strict_calls
from router.parsing.dialects import Dialect
from router.requests.spec import AnswerReading

Choice = str | Mapping[str, object] | None
_PLAIN = Dialect()


def may_call(tools: Sequence[Tool] | None, choice: Choice) -> bool:
    """Whether the model may call one. Raises InvalidRequestError for a choice that is none."""
    if isinstance(choice, Mapping):
        _named(tools, choice)
        return True
    require(choice in (None, "none", "auto", "required"), "tool_choice", "is none, auto, required or a function")
    require(choice != "required" or bool(tools), "tool_choice", "is required, and there are no tools")
    return bool(tools) and choice != "none"


def must_call(choice: Choice) -> bool:
    """Whether it must."""
    return isinstance(choice, Mapping) or choice == "required"


def tool_grammar(
    tools: Sequence[Tool] | None, choice: Choice, *, dialect: Dialect | None, one_call: bool
) -> AskedGrammar | None:
    """What makes the model call what must be called, and by its schema, unless that is not `strict`; without such a
    choice the arguments of functions that are follow theirs. None: nothing is asked for. Raises InvalidRequestError."""
    if not may_call(tools, choice):
        return None
    form, only = (dialect or _PLAIN).form, _only(tools, choice)
    if must_call(choice):
        form, schemas = _forced(tools, only, form)
        if only and form is None:
            return AskedGrammar(forced_arguments(schemas[only]), "tools")
        whole = form is not None and form.before is not None
        return AskedGrammar(forced_calls(form, schemas, one=one_call or bool(only)), "tools", whole)
    if form is None or form.before is not None or not any(tool.function.strict for tool in tools or ()):
        return None
    held = {
        tool.function.name: tool.function.parameters or {} if tool.function.strict else None for tool in tools or ()
    }
    return AskedGrammar(strict_calls(form, held, one=one_call), "tools")


def reading_of(
    tools: Sequence[Tool] | None,
    choice: Choice,
    *,
    dialect: Dialect | None,
    shows_reasoning: bool,
    one_call: bool,
    continues: bool,
) -> AnswerReading | None:
    """Raises InvalidRequestError where nobody can tell calls from text."""
    called = tools if may_call(tools, choice) else None
    only, forced = _only(tools, choice), must_call(choice)
    if dialect is None and not forced:
        text = "cannot be used with this model: its chat template speaks no known dialect; model.parser names one"
        require(not called, "tools", text)
        return None
    known = dialect or _PLAIN
    schemas: Schemas | None = {tool.function.name: tool.function.parameters or {} for tool in called or ()} or None
    in_json = forced and _forced(tools, only, known.form)[0] is None
    return AnswerReading(known, schemas, shows_reasoning, one_call, continues, in_json=in_json, only=only)


def _only(tools: Sequence[Tool] | None, choice: Choice) -> str:
    """The function that must be called; empty: any may."""
    return _named(tools, choice) if isinstance(choice, Mapping) else ""


def _named(tools: Sequence[Tool] | None, choice: Mapping[str, object]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    is_function = choice.get("type", "function") == "function" and isinstance(name, str) and bool(name)
    require(is_function, "tool_choice", "is none, auto, required or a function with its name")
    known = any(tool.function.name == name for tool in tools or ())
    require(known, "tool_choice", f"names {str(name)[:64]!r}, which is none of the tools")
    return str(name)


def _forced(tools: Sequence[Tool] | None, only: str, form: CallForm | None) -> tuple[CallForm | None, Schemas]:
    """(the form of calls that must be made, None: JSON; what their arguments must follow)."""
    chosen = [tool.function for tool in tools or () if only in ("", tool.function.name)]
    schemas = {each.name: {"type": "object"} if each.strict is False else each.parameters or {} for each in chosen}
    return (form if form is not None and form.can_write(schemas) else None), schemas
