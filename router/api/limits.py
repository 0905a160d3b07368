"""The bounds of what clients may ask, and of how long they may take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """Bounds of the HTTP surface."""

    max_n: int = 128
    max_prompts: int = 128
    max_stops: int = 16
    max_stop_chars: int = 1000
    max_logprobs: int = 20
    max_listed_tokens: int = 128
    """Of `logprob_token_ids`, as vLLM's."""
    max_scores: int = 1 << 20
    """Logprobs of prompts' tokens that one answer names, those of others in their places included: 50 MB of JSON."""
    max_salt_chars: int = 1024
    """Of `cache_salt`, as vLLM's. An empty one is refused: it would share what its tenant wants apart."""
    max_user_chars: int = 256
    """Of `user`, by which turns are shared; what follows is not looked at."""
    max_biases: int = 16_384
    """Of `logit_bias`; and of `stop_token_ids`."""
    max_request_id_chars: int = 256
    max_pattern_size: int = 1024
    """Of `repetition_detection`: each token is compared with so many before it."""
    max_bad_words: int = 128
    """As tokens, as vLLM's `VLLM_MAX_NUM_BAD_WORDS`."""
    max_bad_word_chars: int = 16 << 10
    """Of `bad_words` in all."""
    max_messages: int = 8_192
    """Of a chat; and parts of their content, together: 10 µs of the event loop each."""
    inline_tokens: int = 4096
    """Of `/detokenize`: more are read beside the event loop."""
    body_timeout_s: float = 30.0
    send_timeout_s: float = 30.0
    """A client that takes nothing for so long is gone: it would hold its place on a node until the request's time is
    up."""
    look_s: float = 10.0
    """Between two looks at which streams are silent (see `router.api.silences`)."""


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Of what one body may hold: decoding it keeps every other request waiting, threads or not."""

    small_bytes: int = 256 << 10
    """A body of no more is decoded as it is."""
    max_values: int = 1_000_000
    """By its commas."""
    max_strings: int = 131_072
    max_containers: int = 131_072
    """Objects and lists, by their brackets, those in texts included."""
