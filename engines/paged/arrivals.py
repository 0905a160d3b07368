"""From a request to a leg: what is refused at once, and the sequence that will compute the rest."""

from collections.abc import Sequence

from engines.paged.documents import place_documents
from engines.paged.leg import Leg, StopRule
from engines.paged.sequence import PlacedDocument, TokenSequence
from kvcore.chunk_keys import KeyChain, owner_of, split_adapter, usable_chunks
from kvcore.clock import Clock
from kvcore.errors import ContextLengthError, InvalidRequestError
from nodeapi.messages import EngineInfo, GenerateRequest, PrefillRequest

_LAST = 1 << 62


class Arrivals:
    """Makes the legs of one engine and gives each its age. Queues nothing."""

    def __init__(self, info: EngineInfo, stop_rule: StopRule, clock: Clock, *, load: bool) -> None:
        """`load`: there is a store to load from."""
        self._info = info
        self._stop_rule = stop_rule
        self._clock = clock
        self._load = load
        self._arrived = 0

    def prefill_leg(self, request: PrefillRequest) -> Leg | None:
        """A leg for the prompt's full chunks; None: it has none. Raises InvalidRequestError, ContextLengthError."""
        self._check(request.prompt_token_ids, self._stop_rule.max_tokens)
        chunk_tokens = self._info.kv_spec.chunk_tokens
        usable = usable_chunks(len(request.prompt_token_ids), chunk_tokens)
        if not usable:
            return None
        prompt = request.prompt_token_ids[: usable * chunk_tokens]
        sequence = self._sequence(request.request_id, request.cache_salt, prompt, [])
        sequence.wants_load = self._load
        return Leg(request.request_id, self._clock.now(), [sequence], prefer_segment=request.prefer_segment)

    def decode_leg(self, request: GenerateRequest) -> Leg:
        """A leg for all the request's completions. Raises InvalidRequestError, ContextLengthError."""
        params, output = request.sampling, request.output_token_ids
        # A continued request may have reached the end of the context; a new one needs room for a token.
        self._check(request.prompt_token_ids + output, self._stop_rule.max_tokens - (not output))
        if output and params.n != 1:
            raise InvalidRequestError("a continued request has n = 1", param="n")
        sequence = self._sequence(request.request_id, request.cache_salt, request.prompt_token_ids, output)
        sequence.sampling, sequence.indices = params, tuple(range(params.n))
        sequence.wants_load = self._load and sequence.num_reusable_chunks > 0
        sequence.awaits_handoff = request.handoff is not None
        leg = Leg(request.request_id, self._clock.now(), [sequence], handoff=request.handoff)
        if not request.reuse:
            sequence.limit_prefix(0)
            sequence.wants_load = leg.saves = False
        elif request.documents is not None and params.prompt_logprobs is None:
            sequence.documents = self.place(request)
            sequence.held = bool(sequence.documents)
        return leg

    def compared_leg(self, request: GenerateRequest, forced: Sequence[int]) -> Leg:
        """One way of a comparison, led along `forced`. Whatever comes later goes before it. Nothing of it is stored:
        nobody asked for its output, and what it reuses may be wrong."""
        leg = self.decode_leg(request)
        leg.saves = False
        leg.first.whole, leg.first.forced, leg.kept = True, forced, []
        leg.first.age = (_LAST + self._arrived, 0)
        return leg

    def document_leg(self, request_id: str, header: list[int], document: list[int], salt: bytes) -> Leg:
        """A leg that computes a document behind a header alone, and keeps its blocks. Raises as the others do."""
        tokens = header + document
        self._check(tokens, self._stop_rule.max_tokens)
        sequence = self._sequence(request_id, salt, tokens, [])
        sequence.limit_prefix(len(header))
        sequence.wants_load = self._load and sequence.num_reusable_chunks > 0
        leg = Leg(request_id, self._clock.now(), [sequence], saves=False)
        leg.kept = []
        return leg

    def place(self, request: PrefillRequest | GenerateRequest) -> tuple[PlacedDocument, ...]:
        """The request's documents. Raises InvalidRequestError where they do not fit the prompt, or are refused."""
        documents = request.documents
        if documents is None:
            return ()
        if problem := self._info.refuses_documents or documents.problem(len(request.prompt_token_ids)):
            raise InvalidRequestError(f"the request's documents cannot be reused: {problem}", param="documents")
        spec = self._info.kv_spec
        return place_documents(
            documents,
            request.prompt_token_ids,
            fingerprint=spec.fingerprint,
            salt=request.cache_salt,
            chunk_tokens=spec.chunk_tokens,
        )

    def _check(self, tokens: list[int], limit: int) -> None:
        info = self._info
        if not tokens:
            raise InvalidRequestError("the prompt is empty", param="prompt")
        if len(tokens) > limit:
            raise ContextLengthError(
                f"{ContextLengthError.says(info.max_context)}, and this node's KV cache holds "
                f"{info.num_blocks * info.block_size}. However, you requested {len(tokens)} tokens",
                param="prompt",
            )
        if min(tokens) < 0 or max(tokens) >= info.vocab_size:
            raise InvalidRequestError(f"token ids lie in [0, {info.vocab_size})", param="prompt")

    def _sequence(self, request_id: str, salt: bytes, prompt: list[int], output: list[int]) -> TokenSequence:
        self._arrived += 1
        return TokenSequence(
            request_id=request_id,
            age=(self._arrived, 0),
            tokens=[*prompt, *output],
            num_prompt=len(prompt),
            chain=KeyChain.of(self._info.kv_spec.fingerprint, salt),
            chunk_tokens=self._info.kv_spec.chunk_tokens,
            adapter=split_adapter(salt)[0],
            owner=owner_of(salt),
        )
