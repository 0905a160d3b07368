"""A client's request in the router's own words, whatever surface it came by. Values only.

`router.api` translates each surface's bodies into these and is the only place that knows the fields' names there; what
answers them (`router.answering`, `router.requests`) knows these alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import msgspec

from kvcore.documents.keys import keys_of_documents
from kvcore.types import ChunkKey
from nodeapi.sampling import SamplingParams
from router.documents.hits import KeptDocumentKeys
from router.documents.named import NamedDocuments
from router.parsing.dialects import AnswerParser, Dialect
from router.parsing.forced import ForcedParser
from router.parsing.reasoning_tokens import ReasoningTokens
from router.requests.hints import CacheHint
from router.routing.index import KeptKeys
from router.text.repetition import Repetition


class TextPrompt(msgspec.Struct, frozen=True):
    """Text to go on from; special tokens, as the tokenizer adds them, come first unless the client wants none."""

    text: str
    add_special_tokens: bool = True
    documents: Sequence[str] = ()
    """Texts that come before it, see `router.documents.writing`."""


class TokenPrompt(msgspec.Struct, frozen=True):
    """Token ids, taken as they are."""

    token_ids: list[int]


class ChatPrompt(msgspec.Struct, frozen=True):
    """What the model's chat template makes the prompt of."""

    messages: Sequence[Mapping[str, object]]
    """Each has `role` and `content` (a string, a list of text parts or None), and what else the template may read. A
    part with a true `document` is one."""
    add_generation_prompt: bool = True
    """Whether the prompt ends with what begins the assistant's next message."""
    continue_final_message: bool = False
    """Whether the prompt ends where the last message's text ends, for the model to go on with it."""
    template_values: Mapping[str, object] = {}
    """What the client gives the template beside the messages. They count before the special tokens of the same name."""
    documents: Sequence[Mapping[str, object]] | None = None
    tools: Sequence[Mapping[str, object]] | None = None
    add_special_tokens: bool = False
    """A template writes special tokens itself, so that the tokenizer need not."""


Prompt = TextPrompt | TokenPrompt | ChatPrompt


class FieldNames(msgspec.Struct, frozen=True):
    """What the client calls its fields, for the messages and the `param` of errors."""

    prompt: str = "prompt"
    max_tokens: str | None = None
    """None: it has not said how long the answer may be."""
    n: str = "n"
    stop_token_ids: str = "stop_token_ids"
    logit_bias: str = "logit_bias"
    others: Mapping[str, str] = {}
    """Of SamplingParams, where the client calls them otherwise."""

    def of(self, name: str) -> str:
        """What the client calls a field of SamplingParams."""
        return self.others.get(name, name)


class Scoring(msgspec.Struct, frozen=True):
    """What the client wants to see of its prompts.

    `echoes`: what each answer begins with, one a prompt; None in its place: the text of the prompt's tokens; None: no
    echo. `echo_logprobs`: with logprobs of the prompt's tokens and so many others; None: without. `prompt_logprobs`:
    those in a field of their own. `prompt_alone`: nothing of the answer. `listed`: logprobs are of tokens that the
    client lists.
    """

    echoes: tuple[str | None, ...] | None = None
    echo_logprobs: int | None = None
    prompt_logprobs: bool = False
    prompt_alone: bool = False
    listed: bool = False


class ShownFields(msgspec.Struct, frozen=True):
    """What the client wants to see beside the text. Logprobs are asked of the engine: `SamplingParams.logprobs`."""

    token_ids: bool = False
    tokens_as_ids: bool = False
    """Logprobs name a token by its id, as `token_id:7`, not by its text."""
    usage: bool = False
    """Usage at the end of a stream; an answer in one body always has it."""
    usage_so_far: bool = False
    """Usage in every chunk."""
    stream_interval: int = 1
    """Tokens that one piece of a choice has, but for the first and the last."""
    prompt_text: str | None = None
    """What the chat template made, where the client wants to see it."""
    scoring: Scoring = Scoring()


class TextOptions(msgspec.Struct, frozen=True):
    """How an answer's tokens become its text."""

    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    """Matters only where they are shown, and to tokenizers that put a blank between two of them."""
    include_stop: bool = False
    """Whether what ends a completion, a stop string or a stop token, is part of its text."""


@dataclass(frozen=True, slots=True)
class AnswerReading:
    """How the text of a chat's answer is told apart. `tools`: the schema of the arguments of each that was offered, by
    its name; None: none was, or none may be called."""

    dialect: Dialect
    tools: Mapping[str, Mapping[str, object]] | None = None
    shows_reasoning: bool = True
    one_call: bool = False
    """The answer ends where it begins to call another."""
    continues: bool = False
    """The answer goes on with the last message."""
    in_json: bool = False
    """Calls had to be made, and in another form than the dialect's: as a list in JSON."""
    only: str = ""
    """The one function that had to be called; `in_json`: its arguments are all there is."""

    @property
    def thinks(self) -> bool:
        """Whether models that write so reason."""
        return bool(self.dialect.thinks) or self.dialect.frames

    def parser(self, prompt_end: str) -> AnswerParser | ForcedParser:
        """Of one answer, to a prompt that ends so."""
        if self.in_json:
            return ForcedParser(self.dialect, self.only, prompt_end, continues=self.continues)
        return AnswerParser(self.dialect, self.tools, prompt_end, continues=self.continues)

    def counting(self, prompt_end: str) -> ReasoningTokens | None:
        """Of one answer, to a prompt that ends so. None: there is no reasoning to count."""
        if not self.thinks:
            return None
        tools = None if self.in_json else self.tools
        return ReasoningTokens(AnswerParser(self.dialect, tools, prompt_end, continues=self.continues))


class RequestSpec(msgspec.Struct, frozen=True):
    """One prompt in tokens, validated. `request_id` is unique; `client_request_id` is the client's own name for it, and
    `answer_id` the `id` of the answer, where the client chose that, too."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    cache_salt: bytes = b""
    client_request_id: str | None = None
    answer_id: str | None = None
    hints: Sequence[CacheHint] = ()
    """What the client asks of the cache."""
    tenant: str = ""
    """Whose it is; empty: no keys are configured."""
    flow: str = ""
    """As in the `Turn` of its request."""
    max_share: float = 1.0
    """Of the requests that a router takes at a time: while more are under way this one is refused."""
    session: str = ""
    """What the client names its requests by that belong together. It chooses nodes, nothing else."""
    adapter: str = ""
    """The name of the adapter that the salt names, for people; empty: the model alone."""
    documents: NamedDocuments | None = None
    """That the client names in it. None: it names none."""
    keys: KeptKeys = {}
    """Of its chunks, once they were looked for."""
    document_keys: KeptDocumentKeys = {}
    """As `keys`, of its documents."""

    def changed(self, **fields: object) -> Self:
        """Another one, that differs in these. Its keys are not known yet: they depend on the salt."""
        return msgspec.structs.replace(self, keys={}, document_keys={}, **fields)

    def keys_of_documents(self, fingerprint: bytes, chunk_tokens: int) -> list[list[ChunkKey]]:
        """Of each document that it names."""
        kept, named = self.document_keys, self.documents
        if (fingerprint, chunk_tokens) not in kept:
            where = (0, ()) if named is None else (named.header, named.spans)
            kept[fingerprint, chunk_tokens] = keys_of_documents(
                fingerprint, self.cache_salt, self.prompt_token_ids, *where, chunk_tokens=chunk_tokens
            )
        return kept[fingerprint, chunk_tokens]

    @property
    def rows(self) -> int:
        """Tokens that one step brings, those included that logprobs name beside them."""
        named = max(self.sampling.logprobs or 0, len(self.sampling.logprob_token_ids))
        return self.sampling.n * (1 + named)

    @property
    def scores(self) -> int:
        """Logprobs of the prompt's tokens that its answer names, those of others in their places included."""
        top = self.sampling.prompt_logprobs
        return 0 if top is None else self.sampling.n * len(self.prompt_token_ids) * (1 + top)


class Turn(msgspec.Struct, frozen=True):
    """By what a request's turn is known, where it must wait for one, and how long it may.

    `flow`: who shares with others: its tenant, or where no keys are configured the `user` that the client names.
    `rank`: of its priority, the least first. `client_s`, `tenant_s`: how long the first token may take, as the client
    or its tenant's limits say; None: they do not.
    """

    flow: str = ""
    rank: int = 1
    client_s: float | None = None
    tenant_s: float | None = None
    priority: int = 0
    """Among those of its flow: lower is sooner."""


class AnswerRequest(msgspec.Struct, frozen=True):
    """All that one answer is made of: a RequestSpec a prompt, each with its own seed and its own room for tokens.

    `stops`: strings that end a completion. Invariant: at least one spec; the first one's id is the answer's.
    """

    specs: Sequence[RequestSpec]
    stops: Sequence[str] = ()
    shown: ShownFields = ShownFields()
    names: FieldNames = FieldNames()
    text: TextOptions = TextOptions()
    turn: Turn = Turn()
    reading: AnswerReading | None = None
    """None: the text is the answer."""
    client_id: str = ""
    """What the client calls the answer; empty: nothing."""
    repetition: Repetition | None = None
    """What ends an answer that repeats itself."""
    token_prompts: bool = True
    """Whether a prompt may have ids that the router's tokenizer does not give."""
