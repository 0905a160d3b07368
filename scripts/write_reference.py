"""Writes docs/config.md from the schema of a cluster file, docs/metrics.md from kvcore/metric_names.py and
docs/openai.md from the router's schema of requests: `python scripts/write_reference.py`.

`tests/arch/test_reference.py` holds the pages against what this makes, so a line is changed where the code says it.
"""

import ast
import inspect
import itertools
import json
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from kvcore import metric_names
from kvcore.config import fields, schema
from kvcore.config.kv.settings import BlendConfig
from kvcore.config.mooncake_metadata import MooncakeMetadataConfig
from kvcore.config.partitions import PartitionConfig
from kvcore.config.records import RecordsConfig
from kvcore.config.security import ClusterTlsConfig, SecretConfig, TlsConfig
from kvcore.config.tiers import TierConfig
from kvcore.metric_names import Metric
from nodeapi.grammars.structural_tags import FORMATS
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.completion_fields import CompletionRequest
from router.api.fields.other_fields import HARMLESS, REFUSED
from router.api.limits import ApiLimits
from router.api.openai_responses.request import NOT_HAD, ResponsesRequest
from router.parsing.argument_forms import json_arguments, numbered_json
from router.parsing.dialects import DIALECTS, Dialect

ROOT = Path(__file__).resolve().parents[1]
CONFIG_PAGE = ROOT / "docs/config.md"
METRICS_PAGE = ROOT / "docs/metrics.md"
OPENAI_PAGE = ROOT / "docs/openai.md"
DIFFERENCES = ROOT / "tests/vllm/differences.yaml"

_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20))
_PROCESSES = {
    "every process that listens": "kvcore/process",
    "the router": "router",
    "the metadata server": "metadata_server",
    "each node": "kvnode",
}
"""Who exposes metrics, and the package that fills them."""

_CONFIG_HEAD = """# The cluster file

<!-- Made by scripts/write_reference.py from kvcore/config/schema.py: change it there. -->

Every key of a cluster file. One YAML file describes the whole cluster, and every process reads the same one. `--set
PATH=VALUE` overrides a key for one process (`--set router.port=9000`). An unknown key, a key given twice and a
value out of its bounds are errors that name the path.

A *size* is a number of bytes, or text such as `512MiB`, `40GiB` or `2GB`. A key without a default must be given.
*none* as a default: the key is not set.
"""

_METRICS_HEAD = """# Metrics

<!-- Made by scripts/write_reference.py from kvcore/metric_names.py: change it there. -->

Every process answers `GET /metrics` on its HTTP port, the router on `router.admin_port` where there is one, in
Prometheus' text format; with `security.tls` at `https://`, without a certificate of one's own (`tls_config: {ca_file:
...}` in Prometheus). Beside what is below each has the `process_` metrics of Prometheus' client (memory, processor
time, open files, start time). A node whose engine is vLLM also passes on all that vLLM keeps itself: every family that
begins with `vllm:`, under vLLM's names, with the label `node` added. They are described in vLLM's own documentation.

A histogram has the series `NAME_bucket`, `NAME_sum` and `NAME_count`. What the values of the labels `name`, `code`,
`outcome` and `reason` mean is in [troubleshoot.md](troubleshoot.md).
"""


def _family(name: str, dialect: Dialect) -> str:
    form = dialect.form
    is_raw = form is not None and form.arguments not in (json_arguments, numbered_json)
    forced = "JSON" if form is None else "its own, or JSON" if is_raw else "its own"
    strict = "no effect" if form is None or form.before is not None else "held to" + ", or refused" * is_raw
    marks = [f"`` {text} ``" if "`" in text else f"`{text}`" for text in dialect.in_template]
    return f"| `{name}` | {' '.join(marks).replace('|', chr(92) + '|')} | {forced} | {strict} |"


_FAMILIES = "\n".join(_family(name, dialect) for name, dialect in DIALECTS.items())
_OPENAI_HEAD = f"""# The OpenAI API's fields

<!-- Made by scripts/write_reference.py from router/api/fields: change it there. -->

What `POST /v1/chat/completions` and `POST /v1/completions` take: every field of OpenAI's requests and of vLLM's. No
field that would change the answer is ignored: it is obeyed, or refused with an error whose `param` is its name. A field
that nobody knows, such as a slip of the pen, is refused, too. `null` asks for nothing, with any field of this page.

`model` may be left out, a whole number may be written as `3.0`, and a path may end with a slash. Usage counts the
tokens that an answer contains, up to the one that completes a stop string, and so do logprobs and token ids;
`reasoning_tokens` of its details are those that begin between the marks of the reasoning, as vLLM counts them. Stop
strings are looked for after `min_tokens` tokens. `GET /v1/models` says how long prompt and answer may be together:
`max_model_len`. `POST /tokenize` and `/detokenize` answer as vLLM's server does, `/ping` as `/health`, `GET /version`
with kvferry's version, `GET /load` with the requests under way.

Text is scored as by vLLM's server. `echo` puts the prompt before a completion, with `logprobs` of its tokens, and the
last message before a chat's answer that goes on with it; `prompt_logprobs` tells those of the prompt in a field of its
own, and `logprob_token_ids` has `logprobs` tell of these tokens instead of the likeliest. A completion with `echo` may
have `max_tokens` 0: then one token is computed and counted, and not shown. KV has no logprobs, so a decoder computes
the whole prompt where they are wanted, whatever is cached; what it computes is stored for others. A stream tells them
in pieces of up to 1,024, where vLLM's server sends one chunk. An answer names up to {ApiLimits().max_scores:,} of them.

`/v1/embeddings`, `/v2/embed`, `/pooling`, `/classify`, `/score` and `/rerank` are of models that pool: where the nodes
are vLLM servers that run already they go to one as they are, and its answer comes back; kvferry's engines generate
text, and the router answers 404 and says so, as vLLM's server has no such paths with a model that generates.

What a request says nothing of, or `null`, is taken from the model's `generation_config.json`, as vLLM's server takes
it (`temperature`, `top_p`, `top_k`, `min_p`, the penalties, and `max_new_tokens` for chats): the router's log names
what is not OpenAI's. `model.generation_config: false` leaves the file alone.

`POST /v1/messages` and `/v1/messages/count_tokens` are Anthropic's: blocks of text, thinking, calls and results of
tools are translated into a chat as vLLM's server translates them, and what is said here of chats holds for them.
`tool_choice` `any` is `required`, and `tool` is one with a name; `output_config` has a `format`, a JSON schema, and an
`effort`. Images, documents and Anthropic's own tools are refused. Errors have Anthropic's form.

`POST /v1/responses` is OpenAI's other API: messages, reasoning, calls of functions and what came of them are translated
into a chat as vLLM's server translates them, so that `previous_response_id` and the same items sent again are the same
prompt. Its answers are items in the order in which the model began them; a stream tells of them by OpenAI's events, and
ends with `response.completed`, `response.incomplete` or `response.failed`. An item that the length cut off is
`incomplete`, and one sent back so is gone on with. Answers are kept for a day, in the router's memory and at most 64
MiB of them, of each tenant by itself, unless `store` is `false` or its `request_id` cannot stand in a path: `GET` and
`DELETE /v1/responses/ID`. Where several routers or processes answer nothing is kept, and `previous_response_id` is
refused; `store` `true` is where it cannot be had. `background`, `conversation`, `prompt`, images, files and OpenAI's
own tools are refused. What an answer was not asked for is not made: no summary of reasoning.

`POST /inference/v1/generate` is vLLM's endpoint of tokens in and out: `token_ids`, `sampling_params` by the names that
vLLM's own have, and with `output_mode` `text` the text beside the tokens. What is said here of completions holds for
its fields of the same names; without `max_tokens` an answer may fill the context. Images are refused.

`POST /v1/chat/completions/batch` is vLLM's endpoint of several chats at a time: `messages` is a list of lists, up to
128 of them, the other fields are all chats', and the answer has a choice for each, in their order. They run together,
and where one fails so does the answer. `stream`, `tools`, `n` over 1, `prompt_logprobs` and `return_prompt_text` are of
one chat alone, and refused.

Of the paths that vLLM's server has these are not here: `/render` and `/derender` behind the others and
`/inference/v1/abort_requests`, which it has with `--enable-scale-out` alone (`/tokenize` renders a chat, and closing
its connection ends a request); `/tokenizer_info` and `/server_info`, which it has with a flag or in development alone,
as they tell of files and settings; those that load adapters, sleep, profile or change weights, which are a node's or
`kvferry`'s own.

Parts of messages are text.

An answer can be held to a form. `response_format` is `text`, `json_object`, `json_schema` (held to the schema, `strict`
or not) or `structural_tag`; `structured_outputs` has one of `json`, `regex`, `choice`, `grammar`, `json_object` and
`structural_tag`, and for JSON `disable_any_whitespace`, `whitespace_pattern` and `disable_additional_properties`. A
token that the form does not allow cannot come, whatever `logit_bias`, penalties and temperature say; logprobs are
those of before. The answer ends where the form can only end, whatever `min_tokens` and `ignore_eos` say, and by no end
or stop token while it cannot; `max_tokens` and stop strings cut it off all the same. Where the model reasons first the
form holds behind the reasoning. A stream that goes on at another node goes on inside the form.

With the torch and the simulated engine llguidance compiles it
([ADR 18](adr/0018-grammars-are-compiled-by-llguidance.md)): JSON Schema with its `$ref`, `anyOf`, `oneOf` (as `anyOf`
where its branches cannot be told apart), `pattern`, `format` and bounds; regular expressions without look-around and
back references; grammars in Lark, with its `%json`, or in GBNF; of structural tags the formats
{textwrap.fill(", ".join(f"`{name}`" for name in FORMATS), 115)}.
What it does not know (`not`, `uniqueItems`, `if`) is refused with its name before any token, and so is a text of more
than 200,000 characters, one nested deeper than 64 levels, an object of more than 1,000 members, `multipleOf` of one
value of which the least common multiple is over 10,000, or of all over 100,000, patterns in Lark joined by `&` or
turned round by `~`, and what is not compiled within 10 s. Where several forms wait to be compiled their owners have
turns, as those of requests: tenants, or without keys the `user`s, by the time that theirs took. A form in which no
token can come next, or not within its bounds, ends with the error `form_stuck`. With vLLM its own libraries take it,
and refuse what they do not know; about white space they go by the settings of vLLM, whatever a request says. vLLM
servers that are not ours cannot go on with a form that another one began: such an answer ends with the error
`form_cut`. Behind reasoning they begin a form as their own `--reasoning-parser` says.

The model is told of `tools`, and with `tool_choice` `auto`, the default, its calls are told apart from its text: in one
body as `tool_calls`, in a stream as OpenAI streams them, the arguments as they are written. A call that was cut off
(`finish_reason` `length`) is in no body. What it writes between the marks of its reasoning is in `reasoning`, and in
`reasoning_content`, whether there are tools or not; `include_reasoning` `false` leaves it out. Calls in the history and
what came of them reach the model.

With `tool_choice` `required` it calls at least one function, with a name that one and once: the answer is held to that,
and the arguments to the function's `parameters`, unless its `strict` is `false`; `parallel_tool_calls` `false` allows
one call: with `auto`, too, the answer ends where it begins to make another. Such calls are written in the model's own
form where it has one, else as a list in JSON, or with a name as the arguments alone, as vLLM's server has it, so that
no dialect is needed. They come before `response_format`, and with a name the `finish_reason` is `stop`, as OpenAI has
it. With `auto` the calls of models with a form of their own are held to the schemas of the functions that are `strict`,
unless the answer is held to another form. Models of `gpt_oss` make one call an answer, and those of `kimi_k3` may end
before their call.

How a model writes calls and reasoning is its dialect: the first of these whose marks its chat template has, or what
`model.parser` of the cluster file names, which may be an object of yours (`package.module:name`, a
`router.parsing.dialects.Dialect`):

| dialect | marks in the template | form of calls that must be made | `strict`, with `auto` |
|---|---|---|---|
{_FAMILIES}

Where a call has strings without quotes and escapes a schema can say of a string that it is one, or one of several
(`enum`, `const`), and of an object what its properties are, not `pattern`, `format`, lengths, `minProperties` or
`anyOf` of objects; with `gemma4` a list has no bounds, and every object has properties with names. A call with other
arguments that must be made is then JSON; a `strict` function with them is refused by name. So it is where a name that
is written without quotes has other characters than letters, digits, `_`, `.` and `-`.

With `none` answers are given out as they are written. With `qwen3_xml` and `gemma4` a call ends reasoning that the
model forgot to end, as in vLLM. Of the 469 answers of the conformance suite canitoolcall 0.1.1 all but 25 are parsed as
it has them, however they are cut into pieces (by its own table vLLM 0.30 misses 115); 22 of these were cut off within a
call:

| family | answers | parsed so |
|---|---|---|
| deepseek | 85 | 76 |
| gemma4 | 48 | 48 |
| glm | 51 | 47 |
| gpt-oss | 51 | 49 |
| kimi | 49 | 47 |
| llama | 34 | 33 |
| mistral | 47 | 46 |
| qwen3-hermes | 50 | 45 |
| qwen3-xml | 54 | 53 |

The chat template is the model folder's: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`; of
several named ones `default`, and `tool_use` for requests with tools. It renders as in transformers, of messages in the
form that vLLM's server hands over: parts are joined by a newline unless the template loops over them; the arguments of
calls are objects; `reasoning` and `reasoning_content` are one; developers are the system where the template knows none.
`chat_template_kwargs`, `documents` and `reasoning_effort` are variables of the template. One that cannot be read, or
does too much, costs the chats that need it an error of 400, and nothing else.

`documents` that the template does not write out come before the text of the last user's message, and those of a
completion before its prompt. They, and parts of a message with `"document": true`, may be reused wherever they stand,
if the cluster file says so ([documents.md](documents.md)): the header `X-KVFerry-Approximate` and `approximate_tokens`
of `usage.prompt_tokens_details` say whether any was.

`allowed_token_ids` and `bad_words` bind the engine; the words' tokens are those that vLLM makes of them, at the
beginning and after a blank. `repetition_detection` ends an answer with the token with which vLLM ends it, and
`finish_reason` `repetition`. `vllm_xargs` and `thinking_token_budget` are for vLLM's engines, the latter where they
have a reasoning parser; where no node that is up obeys a field, it is refused. `priority` says who of the same tenant,
or `user`, waits less, the lower the less ([overload.md](overload.md)). `request_id` is the answer's `id`, after the
endpoint's prefix. `return_prompt_text` shows what the chat template made.

`prompt_cache_key`, `prompt_cache_options`, `prompt_cache_retention` and `cache_control`, which messages and parts may
have, too, are hints to the cache: taken whatever they hold, and no answer depends on them ([hit-rate.md](hit-rate.md)).

The header `X-KVFerry-First-Token-S` says how long the first token may take, in seconds: a request that would get it
later is refused with 429 and `Retry-After` ([overload.md](overload.md)). Without API keys, `user` says who shares the
nodes with others when requests must wait.
"""

_DIFFERENCES_HEAD = """
## Differences from vLLM's server

`tests/vllm/test_differential.py` sends hundreds of bodies, good and bad, to vLLM 0.32's own server and to kvferry
over the same vLLM, and compares status, tokens of the prompt, text, usage and every field. What is not the same:

| | vLLM | kvferry |
|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a section."""

    path: str
    kind: str
    default: str
    meaning: str


def config_sections() -> Iterator[tuple[str, str, list[Key]]]:
    """(path of the section, what it is, its keys), for the whole file first."""
    top = schema.ClusterConfig
    yield "", _text(top.__doc__), list(_keys(top, ""))
    engines = [_described(kind, "engine", "Which engine this is.") for kind in get_args(schema.EngineConfig)]
    names = ("model", "engine", "nodes", "kv", "transport", "store", "tiers")
    names += ("metadata_server", "router", "service", "security")
    for name in names:
        if name == "engine":
            yield from engines
        elif name == "tiers":
            yield name, _text(schema.TiersConfig.__doc__), list(_keys(schema.TiersConfig, "tiers."))
            for tier, hint in get_type_hints(schema.TiersConfig).items():
                for kind in get_args(hint):
                    if isinstance(kind, type) and issubclass(kind, TierConfig):
                        yield f"tiers.{tier}", _text(kind.__doc__), list(_keys(kind, f"tiers.{tier}."))
        else:
            kind = schema.NodeConfig if name == "nodes" else get_type_hints(top)[name]
            path = "nodes.NAME." if name == "nodes" else f"{name}."
            yield path, _text(kind.__doc__), list(_keys(kind, path))
        if name == "metadata_server":
            path = f"{name}.mooncake."
            yield path, _text(MooncakeMetadataConfig.__doc__), list(_keys(MooncakeMetadataConfig, path))
            path = f"{name}.partitions[]."
            yield path, _text(PartitionConfig.__doc__), list(_keys(PartitionConfig, path))
            for kind in get_args(RecordsConfig):
                yield _described(kind, "metadata_server.records", "Where they are kept.")
        if name == "kv":
            yield f"{name}.blend.", _text(BlendConfig.__doc__), list(_keys(BlendConfig, f"{name}.blend."))
        if name == "router":
            yield f"{name}.tls.", _text(TlsConfig.__doc__), list(_keys(TlsConfig, f"{name}.tls."))
        if name == "security":
            yield f"{name}.secret.", _text(SecretConfig.__doc__), list(_keys(SecretConfig, f"{name}.secret."))
            yield f"{name}.tls.", _text(ClusterTlsConfig.__doc__), list(_keys(ClusterTlsConfig, f"{name}.tls."))


def config_page() -> str:
    """The text of docs/config.md."""
    parts = [_CONFIG_HEAD]
    for path, about, keys in config_sections():
        parts.append(f"\n## {path.rstrip('.') or 'The whole file'}\n\n{about}\n")
        parts.append("\n| key | type | default | |\n|---|---|---|---|\n")
        parts += [f"| `{key.path}` | {key.kind} | {key.default} | {key.meaning} |\n" for key in keys]
    return "".join(parts)


def metrics() -> dict[str, Metric]:
    """Every metric, by the name that the code calls it."""
    return {name: value for name, value in vars(metric_names).items() if isinstance(value, Metric)}


def metrics_by_process() -> dict[str, list[Metric]]:
    """The metrics that each process fills, as its package's sources name them."""
    found = {}
    for process, package in _PROCESSES.items():
        code = "\n".join(path.read_text() for path in sorted((ROOT / package).rglob("*.py")))
        named = set(re.findall(r"\bnames\.([A-Z_]+)", code))
        found[process] = [metric for name, metric in metrics().items() if name in named]
    return found


def metrics_page() -> str:
    """The text of docs/metrics.md."""
    parts = [_METRICS_HEAD]
    for process, exposed in metrics_by_process().items():
        parts.append(f"\n## Of {process}\n\n| metric | type | labels | |\n|---|---|---|---|\n")
        for metric in exposed:
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            parts.append(f"| `{metric.name}` | {metric.kind.value} | {labels} | {_cell(metric.help)} |\n")
    return "".join(parts)


def openai_page() -> str:
    """The text of docs/openai.md."""
    chat, completions = ChatRequest.__struct_fields__, CompletionRequest.__struct_fields__
    both = [name for name in completions if name in chat]
    responses_refuse = ("background", *NOT_HAD)
    obeyed = (
        ("Of both", both),
        ("Of chats alone", [name for name in chat if name not in both]),
        ("Of completions alone", [name for name in completions if name not in both]),
        ("Of `/v1/responses`", [name for name in ResponsesRequest.__struct_fields__ if name not in responses_refuse]),
    )
    parts = [_OPENAI_HEAD, "\n## Obeyed\n\n"]
    for whose, names in obeyed:
        text = f"{whose}: {', '.join(f'`{name}`' for name in sorted(names))}."
        parts.append("\n".join(textwrap.wrap(text, 120, break_on_hyphens=False)) + "\n\n")
    parts.append("## Taken and without effect\n\n| field | why no answer depends on it |\n|---|---|\n")
    parts += [f"| `{name}` | {why} |\n" for name, why in HARMLESS.items()]
    parts.append("\n## Refused\n\n| field | values that are taken all the same | instead |\n|---|---|---|\n")
    for name, refused in REFUSED.items():
        taken = ", ".join(f"`{json.dumps(value)}`" for value in refused.neutral)
        obeying = [where for where, names in (("chats", chat), ("completions", completions)) if name in names]
        instead = refused.instead + "".join(f" ({where} have it)" for where in obeying)
        parts.append(f"| `{name}` | {taken} | {instead} |\n")
    parts.append(_DIFFERENCES_HEAD)
    differences = yaml.safe_load(DIFFERENCES.read_text())
    parts += [f"| {one['what']} | {one['theirs']} | {one['ours']} |\n" for one in differences]
    return "".join(parts)


def _described(kind: type[msgspec.Struct], section: str, what: str) -> tuple[str, str, list[Key]]:
    """One of several sections that are told from each other by their `kind`."""
    tag = str(kind.__struct_config__.tag)
    keys = [Key(f"{section}.kind", f"`{tag}`", "must be given", what), *_keys(kind, f"{section}.")]
    return f"{section}, kind {tag}", _text(kind.__doc__), keys


def _keys(kind: type[msgspec.Struct], path: str) -> Iterator[Key]:
    docs, hints = _field_docs(kind), get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        hint = hints[field.name]
        meaning = [docs.get(field.name, ""), *_choices(hint)]
        yield Key(path + field.name, _kind(hint), _default(field), _cell(" ".join(filter(None, meaning))))


def _field_docs(kind: type) -> dict[str, str]:
    """The docstring below each field or member of a class, and of those that it inherits from a section."""
    tree = _parsed(inspect.getfile(kind))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
    inherited = [base for base in kind.__bases__ if base.__module__ == kind.__module__]
    found = {name: text for base in inherited for name, text in _field_docs(base).items()}
    for field, text in itertools.pairwise(body):
        target = field.target if isinstance(field, ast.AnnAssign) else getattr(field, "targets", [None])[0]
        if isinstance(target, ast.Name) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[target.id] = _text(str(text.value.value))
    return found


def _kind(hint: Any) -> str:
    """The type in words, with its bounds."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind(arguments[0]) + _bounds(arguments[1])
    if origin in (Union, types.UnionType):
        structs = [kind for kind in arguments if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
        return "section" if structs else " or ".join(_kind(kind) for kind in arguments if kind is not type(None))
    if origin is Literal:
        return " \\| ".join(f"`{choice}`" for choice in arguments)
    if origin is list and isinstance(arguments[0], type) and issubclass(arguments[0], msgspec.Struct):
        return "list of sections"
    if origin in (list, dict):
        return "list of text" if origin is list else "mapping"
    if issubclass(hint, StrEnum):
        return " \\| ".join(f"`{member}`" for member in hint)
    if issubclass(hint, msgspec.Struct):
        return "section"
    return {bool: "true or false", int: "whole number", float: "number", str: "text", fields.ByteSize: "size"}[hint]


def _bounds(meta: msgspec.Meta) -> str:
    signs = (("from", meta.ge), ("more than", meta.gt), ("to", meta.le), ("of length from", meta.min_length))
    return "".join(f" {word} {bound:g}" for word, bound in signs if bound is not None)


def _choices(hint: Any) -> Iterator[str]:
    """What each member of an enumeration means."""
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        docs = _field_docs(hint)
        yield from (f"`{member}`: {docs[member.name]}" for member in hint if member.name in docs)


def _default(field: Any) -> str:
    if field.default is None:
        return "none"
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{field.default_factory()}`"
    if field.default is msgspec.NODEFAULT:
        return "must be given"
    if isinstance(field.default, msgspec.Struct):
        return "all defaults"
    if isinstance(field.default, fields.ByteSize):
        return f"`{_size(field.default)}`"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _size(size_bytes: int) -> str:
    unit, factor = next((unit, factor) for unit, factor in _UNITS if size_bytes % factor == 0)
    return f"{size_bytes // factor}{unit}"


@cache
def _parsed(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text())


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write all pages."""
    CONFIG_PAGE.write_text(config_page())
    METRICS_PAGE.write_text(metrics_page())
    OPENAI_PAGE.write_text(openai_page())


if __name__ == "__main__":
    main()
