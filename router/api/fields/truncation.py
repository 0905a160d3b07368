"""Prompts that a client wants shortened rather than refused: `truncate_prompt_tokens`, with vLLM's meaning."""

from router.api.fields.checks import require

SIDES = (None, "left", "right")


def truncated(prompt: list[int], limit: int | None, side: str | None, room: int, context: int) -> list[int]:
    """At most `limit` tokens of the prompt; -1: as many as its `room`, which the completion leaves; None: all. No limit
    is over the `context`.

    `side`: where tokens are taken away; None: left, as a model goes on from what comes last.
    """
    require(side in SIDES, "truncation_side", "must be left or right")
    if limit is None:
        return prompt
    require(limit >= -1, "truncate_prompt_tokens", "must be at least 0, or -1 for what fits")
    require(limit <= context, "truncate_prompt_tokens", f"must not be over the context of {context}")
    kept = max(1, room) if limit == -1 else limit  # where there is no room, that is what is said
    if len(prompt) <= kept:
        return prompt
    return prompt[:kept] if side == "right" else prompt[len(prompt) - kept :]
