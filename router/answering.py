"""From neutral requests to answers: prompts to tokens, checks, runs of the dispatcher.

Knows no HTTP and no surface's field names. What becomes of an answer is `router.client_answer`'s.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import msgspec

from kvcore.chunk_keys import adapted_salt
from kvcore.config.kv.settings import BlendConfig
from kvcore.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    NodeUnavailableError,
    OverloadedError,
)
from nodeapi.grammars.grammar import Grammar
from router.adapters import AdapterNames
from router.admission.gate import Admission
from router.client_answer import AnswerLimits, ClientAnswer
from router.documents.gate import DocumentGate
from router.documents.named import PromptTokens
from router.documents.reading import PromptReader
from router.nodes.cluster import Cluster
from router.requests.dispatch import Dispatcher
from router.requests.run import RequestRun
from router.requests.spec import AnswerRequest, ChatPrompt, Prompt, RequestSpec, TextPrompt, TokenPrompt
from router.routing.decision import Decision
from router.routing.obeying import refuse_if_all_lack
from router.text.bad_words import bad_word_tokens
from router.text.grammar_checks import GrammarChecks
from router.text.tokenizer import Runner, Tokenizer


def _num_chars(prompt: Prompt) -> int:
    """Of all texts in it: how much work it is to make tokens of it."""
    if isinstance(prompt, TokenPrompt):
        return 0
    if isinstance(prompt, TextPrompt):
        return len(prompt.text) + (sum(map(len, prompt.documents)) if prompt.documents else 0)
    count = 0
    rest: list[object] = [prompt.messages, prompt.tools, prompt.documents, prompt.template_values]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, dict):  # as JSON's objects are; a test for any Mapping takes five times as long
            rest += [*value, *value.values()]
    return count


class Answerer:
    """Starts answers. One a router. A surface calls, in this order: `check_model`, `encode`, `adapted`, `start`."""

    def __init__(
        self,
        *,
        model: str,
        tokenizer: Tokenizer,
        dispatcher: Dispatcher,
        cluster: Cluster,
        run: Runner,
        admission: Admission | None = None,
        limits: AnswerLimits = AnswerLimits(),
        aliases: Sequence[str] = (),
        adapters: Mapping[str, str] = {},
        grammars: GrammarChecks | None = None,
        blend: BlendConfig = BlendConfig(),
        gate: DocumentGate | None = None,
    ) -> None:
        """`adapters`: the cluster file's, by their names. `gate`: by which documents are reused; None: that of `blend`
        alone."""
        self.model, self.names = model, (model, *aliases)
        self.adapters = AdapterNames(cluster, adapters)
        self.tokenizer = tokenizer
        self._dispatcher = dispatcher
        self._cluster = cluster
        self._run = run
        self._reader = PromptReader(tokenizer, blend.separator)
        self._gate = gate or DocumentGate(blend)
        self._grammars = grammars or GrammarChecks(None)
        self._limits = limits
        self._admission = admission
        self._waiting_chars = 0

    def __repr__(self) -> str:
        return f"<Answerer of {self.model!r}>"

    @property
    def max_context(self) -> int | None:
        """Tokens that a prompt and its completion may have together; None: no engine has ever reported."""
        return self._cluster.max_context()

    def check_model(self, name: str) -> None:
        """Raises ModelNotFoundError."""
        if name not in self.names and name not in self.adapters:
            raise ModelNotFoundError(f"the model {name!r} does not exist here; there is {self.model!r}", param="model")

    def adapted(self, request: AnswerRequest, name: str | None) -> AnswerRequest:
        """The request, of the adapter if that is what a checked `model` names. Raises NodeUnavailableError where no
        node that is up serves it."""
        if not name or name in self.names:
            return request
        identity = self.adapters.identity(name)
        specs = [
            spec.changed(cache_salt=adapted_salt(identity, spec.cache_salt), adapter=name) for spec in request.specs
        ]
        return msgspec.structs.replace(request, specs=specs)

    def told_name(self, name: str | None) -> str:
        """What an answer calls the model for which a checked `model` was sent."""
        return name if name and name not in self.names else self.model

    async def check_grammar(self, grammar: Grammar, param: str, owner: str = "") -> None:
        """Whether an answer can follow it. `owner`: who waits for his own. Raises InvalidRequestError,
        OverloadedError."""
        await self._grammars.check(grammar, param, owner)

    async def encode(self, prompts: Sequence[Prompt], whose: str = "") -> list[list[int]]:
        """As `read`, the tokens alone."""
        return [one.token_ids for one in await self.read(prompts, whose)]

    async def read(self, prompts: Sequence[Prompt], whose: str = "") -> list[PromptTokens]:
        """The tokens of each prompt, and where its documents stand. `whose`: what others have asked makes it no faster.
        Raises InvalidRequestError where the chat template refuses the messages, and OverloadedError."""
        num_chars, limits, tokens = sum(map(_num_chars, prompts)), self._limits, self._reader.tokens
        if num_chars <= limits.inline_chars:
            return [tokens(prompt, whose) for prompt in prompts]
        if self._waiting_chars and self._waiting_chars + num_chars > limits.max_waiting_chars:
            raise OverloadedError(f"texts of {self._waiting_chars} characters wait to be made tokens; come back later")
        self._waiting_chars += num_chars
        try:
            return [
                tokens(prompt, whose)
                if isinstance(prompt, TokenPrompt)
                else await self._run(partial(tokens, prompt, whose))
                for prompt in prompts
            ]
        finally:
            self._waiting_chars -= num_chars

    async def bad_words(self, words: Sequence[str], most: int) -> list[list[int]]:
        """The tokens of these (`router.text.bad_words`). Raises InvalidRequestError."""
        if not words:
            return []
        tokens = partial(bad_word_tokens, words, self.tokenizer, most)
        return tokens() if len(words) <= self._limits.inline_words else await self._run(tokens)

    async def prompt_text(self, prompt: Prompt) -> str:
        """What the chat template makes. Raises InvalidRequestError."""
        assert isinstance(prompt, ChatPrompt), "only chats show it"
        render = partial(self._reader.text, prompt)
        return render() if _num_chars(prompt) <= self._limits.inline_chars else await self._run(render)

    async def admit(self, request: AnswerRequest) -> ClientAnswer:
        """As `start`, when its turn has come. Raises RateLimitError too, where its first token would come too late."""
        if self._admission is None:  # whoever comes gets in
            return self.start(request)
        request = self.gated(request)
        self._check(request)
        return await self._admission.admit(request, partial(self._open, request))

    def start(self, request: AnswerRequest) -> ClientAnswer:
        """Route the prompts; iterating the answer's pieces runs them.

        Raises NodeUnavailableError, InvalidRequestError, ContextLengthError, OverloadedError: of none is anything left.
        """
        request = self.gated(request)
        self._check(request)
        return self._open(request)

    def _check(self, request: AnswerRequest) -> None:
        max_context = self.max_context
        if max_context is None:
            raise NodeUnavailableError(self._cluster.why_no_decoder())
        for spec in request.specs:
            self._check_fit(spec, max_context, request)
        if asks := request.specs[0].sampling.asks:
            refuse_if_all_lack(asks, self._cluster.view(), request.names.of)
        if sum([spec.sampling.n for spec in request.specs]) > self._limits.max_choices:
            text = f"{request.names.n} times the prompts must not be over {self._limits.max_choices}"
            raise InvalidRequestError(text, param=request.names.n)

    def _open(self, request: AnswerRequest, first: Decision | None = None, waited_s: float = 0.0) -> ClientAnswer:
        """`first`: the nodes of the first prompt, just chosen."""
        runs: list[RequestRun] = []
        try:
            for number, spec in enumerate(request.specs):
                runs.append(self._dispatcher.open(spec, None if number else first, waited_s=waited_s))
        except BaseException:
            for run in runs:
                run.drop()
            raise
        return ClientAnswer(self.tokenizer, runs, request, self._limits)

    def gated(self, request: AnswerRequest) -> AnswerRequest:
        """Its documents are reused if that is allowed now."""
        if not [spec for spec in request.specs if spec.documents is not None]:
            return request
        specs = [self._gate.passed(self.model, spec) for spec in request.specs]
        return msgspec.structs.replace(request, specs=specs)

    def _check_fit(self, spec: RequestSpec, max_context: int, request: AnswerRequest) -> None:
        prompt, sampling, names = spec.prompt_token_ids, spec.sampling, request.names
        if not prompt:
            raise InvalidRequestError(f"{names.prompt} has no tokens", param=names.prompt)
        if len(prompt) + sampling.max_tokens > max_context:
            raise ContextLengthError(
                f"{ContextLengthError.says(max_context)}. However, you requested {len(prompt) + sampling.max_tokens} "
                f"tokens ({len(prompt)} in the {names.prompt}, {sampling.max_tokens} for the completion)",
                param=names.prompt if len(prompt) >= max_context else names.max_tokens or names.prompt,
            )
        vocab_size = self._cluster.vocab_size()
        if vocab_size is None:
            return
        if request.token_prompts or self.tokenizer.num_ids > vocab_size:
            _check_ids(names.prompt, prompt, vocab_size)
        _check_ids(names.stop_token_ids, sampling.stop_token_ids, vocab_size)
        _check_ids(names.logit_bias, sampling.logit_bias, vocab_size)
        _check_ids(names.of("allowed_token_ids"), sampling.allowed_token_ids, vocab_size)
        _check_ids(names.of("logprob_token_ids"), sampling.logprob_token_ids, vocab_size)


def _check_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    if ids and (biggest := max(ids)) >= vocab_size:
        text = f"{name}: token id {biggest} is outside of the vocabulary of {vocab_size}"
        raise InvalidRequestError(text, param=name)
