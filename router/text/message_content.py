"""A message's content in the form that a chat template reads: one string, or a list of parts. No I/O.

Most templates take a string. Those of models that also see pictures loop over the parts of a message; they get parts.
"""

from collections.abc import Iterator, Mapping

from jinja2 import nodes


def as_parts_or_text(message: Mapping[str, object], *, parts: bool) -> str | list[dict[str, str]]:
    """The message's content in the form that its template reads; what a tool answered is always one string."""
    content = message.get("content")
    return to_parts(content) if parts and message.get("role") != "tool" else join_parts(content)


def as_system_messages(messages: list[dict[str, object]]) -> list[dict[str, object]]:
    """For templates that know no developers: their messages are the system's, put together at the beginning as vLLM's
    server does. Messages without any developer stay as they are."""
    if all(message["role"] != "developer" for message in messages):
        return messages
    seen = [
        {**{key: value for key, value in message.items() if key != "tools"}, "role": "system"}
        if message["role"] == "developer"
        else message
        for message in messages
    ]
    ruling = [message for message in seen if message["role"] == "system"]
    if ruling == seen[:1]:
        return seen
    texts = [text for message in ruling if (text := join_parts(message["content"]))]
    others = [message for message in seen if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *others]


def join_parts(content: object) -> str:
    """One string; parts are joined by a newline, as vLLM's server joins them."""
    return "\n".join(part["text"] for part in to_parts(content))


def to_parts(content: object) -> list[dict[str, str]]:
    """A list of parts, the caller's to change; a string is one part, and no content is none."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [dict(part) for part in content] if isinstance(content, list) else []


def template_reads_parts(template: nodes.Template) -> bool:
    """Whether it loops over a message's content.

    Names are followed through assignments and loops, and a message's content into macros; beside them a loop over the
    plain name `content` counts. (vLLM judges by the same signs.)
    """
    messages = _names_of(template, "messages")
    loops = list(template.find_all(nodes.For))
    items = {name for loop in loops if _source(loop.iter) in messages for name in _targets(loop.target)}
    within: dict[int, set[str]] = {}
    for macro in template.find_all(nodes.Macro):
        parameters = _content_parameters(template, macro, items)
        for loop in macro.find_all(nodes.For):
            within.setdefault(id(loop), set()).update(parameters)
    return any(
        _is_content_of(loop.iter, items)
        or (isinstance(loop.iter, nodes.Name) and loop.iter.name in within.get(id(loop), {"content"}))
        for loop in loops
    )


def _content_parameters(template: nodes.Template, macro: nodes.Macro, items: set[str]) -> set[str]:
    """The macro's parameters that a message's content is handed to somewhere."""
    names = [parameter.name for parameter in macro.args]
    found: set[str] = set()
    for call in template.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            given = [*zip(names, call.args, strict=False), *((one.key, one.value) for one in call.kwargs)]
            found |= {name for name, value in given if name in names and _is_content_of(value, items)}
    return found


def _names_of(template: nodes.Template, first: str) -> set[str]:
    """`first` and the names that it is assigned to, through filters and slices."""
    names: set[str] = {first}
    assignments = list(template.find_all(nodes.Assign))
    while True:
        found = {name for one in assignments if _source(one.node) in names for name in _targets(one.target)}
        if found <= names:
            return names
        names |= found


def _is_content_of(node: nodes.Node, items: set[str]) -> bool:
    node = _bare(node)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content" and _source(node.node) in items
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value == "content" and _source(node.node) in items
    return False


def _source(node: nodes.Node) -> str | None:
    node = _bare(node)
    return node.name if isinstance(node, nodes.Name) else None


def _bare(node: nodes.Node) -> nodes.Node:
    """Without the filters and slices around it."""
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _bare(node.node)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _bare(node.node)
    return node


def _targets(target: nodes.Node) -> Iterator[str]:
    if isinstance(target, nodes.Name):
        yield target.name
