"""From a request to a leg: what is refused at once, and the sequence that will compute the rest."""

from engines.paged.leg import Leg, StopRule
from engines.paged.sequence import TokenSequence
from kvcore.chunk_keys import KeyChain, owner_of, usable_chunks
from kvcore.clock import Clock
from kvcore.errors import ContextLengthError, InvalidRequestError
from nodeapi.messages import EngineInfo, GenerateRequest, PrefillRequest


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
        sequence = self._sequence(request, request.prompt_token_ids[: usable * chunk_tokens], [])
        sequence.wants_load = self._load
        return Leg(request.request_id, self._clock.now(), [sequence], prefer_segment=request.prefer_segment)

    def decode_leg(self, request: GenerateRequest) -> Leg:
        """A leg for all the request's completions. Raises InvalidRequestError, ContextLengthError."""
        params, output = request.sampling, request.output_token_ids
        # A continued request may have reached the end of the context; a new one needs room for a token.
        self._check(request.prompt_token_ids + output, self._stop_rule.max_tokens - (not output))
        if output and params.n != 1:
            raise InvalidRequestError("a continued request has n = 1", param="n")
        sequence = self._sequence(request, request.prompt_token_ids, output)
        sequence.sampling, sequence.indices = params, tuple(range(params.n))
        sequence.wants_load = self._load and sequence.num_reusable_chunks > 0
        sequence.awaits_handoff = request.handoff is not None
        return Leg(request.request_id, self._clock.now(), [sequence], handoff=request.handoff)

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

    def _sequence(
        self, request: PrefillRequest | GenerateRequest, prompt: list[int], output: list[int]
    ) -> TokenSequence:
        self._arrived += 1
        return TokenSequence(
            request_id=request.request_id,
            age=(self._arrived, 0),
            tokens=[*prompt, *output],
            num_prompt=len(prompt),
            chain=KeyChain.of(self._info.kv_spec.fingerprint, request.cache_salt),
            chunk_tokens=self._info.kv_spec.chunk_tokens,
            owner=owner_of(request.cache_salt),
        )
