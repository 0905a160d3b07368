"""What a body of /inference/v1/generate asks, and how its answer is written."""

from functools import partial

from router.api.asked import Asked
from router.api.body import beside_if_large
from router.api.tokens_in.generate_format import GenerateFormatter
from router.api.tokens_in.request import GenerateBody, completion_of, name_here
from router.tenants.callers import Caller


async def generate_asked(body: GenerateBody, _: Caller, num_bytes: int) -> Asked:
    """Raises InvalidRequestError."""
    write = partial(GenerateFormatter, text=body.output_mode == "text", prompt=bool(body.return_token_ids))
    completion = await beside_if_large(num_bytes, partial(completion_of, body))
    return Asked(completion, write, num_bytes, "token_ids", names=name_here)
