"""What a body of any surface asks: the chat or the completion that it is, how its answer is written, and its start."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import msgspec
from starlette.types import Scope

from kvcore.errors import InvalidRequestError
from router.admission.header import with_first_token
from router.admission.no_node import NoNodeWait, Tell
from router.answering import Answerer
from router.api.body import beside_if_large
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.completion_fields import CompletionRequest
from router.api.fields.openai_schema import answer_request, bad_words_of, flow_of, grammar_asked_by, prompts_of
from router.api.fields.structured import AskedGrammar
from router.api.formats.formatter import Formatter
from router.api.limits import ApiLimits
from router.client_answer import ClientAnswer
from router.tenants.callers import Caller, caller_of
from router.text.model_habits import ModelHabits
from router.text.tokenizer import Tokenizer

_Body = TypeVar("_Body")
MakeFormatter = Callable[[ClientAnswer, str, int, Tokenizer], Formatter]
"""Of an answer, by the model's name and the time in seconds at which it began."""


class Asked(msgspec.Struct, frozen=True):
    """`num_bytes`: of all that the prompts are made of. `prompt`: what the surface calls the prompt; None: as OpenAI's
    endpoint of that kind does."""

    body: ChatRequest | CompletionRequest
    formatter: MakeFormatter
    num_bytes: int
    prompt: str | None = None
    form: str = ""
    """What it calls `response_format`; empty: so."""
    names: Callable[[str], str] = str
    """What it calls another field of a chat or a completion."""

    def named(self, form: AskedGrammar | None) -> AskedGrammar | None:
        """The same, by the surface's name."""
        if form is None or not self.form or form.field != "response_format":
            return form
        return replace(form, param=self.form)

    def told(self, error: InvalidRequestError) -> InvalidRequestError:
        """The same, by the surface's name of the field."""
        given = error.param or ""
        name = self.names(given)
        if name == given:
            return error
        message = error.message.removeprefix(given)
        return type(error)(error.message if message == error.message else f"{name}{message}", param=name)


def asked_as(
    formatter: MakeFormatter,
    translate: Callable[[_Body], ChatRequest | CompletionRequest],
    names: Callable[[str], str] = str,
) -> Callable[[_Body, Caller, int], Awaitable[Asked]]:
    """What a surface asks whose bodies `translate` makes chats of. Of bodies, whose they are, and how many bytes."""

    async def asked(body: _Body, _: Caller, num_bytes: int) -> Asked:
        return Asked(await beside_if_large(num_bytes, partial(translate, body)), formatter, num_bytes, names=names)

    return asked


class AnswerStart:
    """From what was asked to the answer under way: one a router."""

    def __init__(
        self, answerer: Answerer, limits: ApiLimits, *, no_node: NoNodeWait | None, habits: ModelHabits
    ) -> None:
        """As in `make_app`."""
        self._answerer, self._limits = answerer, limits
        self._no_node, self._habits = no_node, habits

    async def start(self, asked: Asked, scope: Scope, request_id: str, tell: Tell) -> tuple[ClientAnswer, Formatter]:
        """When its turn has come; waits for a node, and tells, where there is none. Raises what `Answerer` does."""
        try:
            return await self._start(asked, scope, request_id, tell)
        except InvalidRequestError as error:
            raise asked.told(error) from error

    async def _start(self, asked: Asked, scope: Scope, request_id: str, tell: Tell) -> tuple[ClientAnswer, Formatter]:
        answerer, body, caller = self._answerer, asked.body, caller_of(scope)
        if body.model:
            answerer.check_model(body.model)
        form = asked.named(grammar_asked_by(body, self._habits.dialect))
        if form is not None:
            await answerer.check_grammar(form.grammar, form.param, caller.tenant or flow_of(body, self._limits))
        given = await beside_if_large(asked.num_bytes, partial(prompts_of, body, self._limits))
        prompts = await answerer.read(given, caller.apart(body.cache_salt))
        token_ids = [one.token_ids for one in prompts]
        shows_prompt = isinstance(body, ChatRequest) and body.return_prompt_text
        if self._no_node is not None:
            await self._no_node.until_up(token_ids, tell)
        words = bad_words_of(body, self._limits)
        wanted = answer_request(
            body,
            token_ids,
            max_context=answerer.max_context,
            habits=self._habits,
            request_id=request_id,
            client_request_id=scope["request_id"],
            limits=self._limits,
            prompt_name=asked.prompt,
            form=form,
            bad_words=await answerer.bad_words(words, self._limits.max_bad_words) if words else [],
            prompt_text=await answerer.prompt_text(given[0]) if shows_prompt else None,
            documents=[one.documents for one in prompts],
        )
        wanted = answerer.adapted(with_first_token(wanted, scope), body.model)
        answer = await caller.begin(wanted, answerer.admit)
        try:
            name = answerer.told_name(body.model)
            return answer, asked.formatter(answer, name, int(time.time()), answerer.tokenizer)
        except BaseException:
            answer.close()
            raise
