"""Fields of OpenAI's and vLLM's requests that are not obeyed here: each is harmless, or refused by name.

With the fields of the structs in the modules beside this one the table is closed: what is in none of them is
refused too, never ignored. A field that begins to be obeyed goes from here to its struct, which counts first.
"""

from dataclasses import dataclass

HARMLESS: dict[str, str] = {
    "length_penalty": "counts with use_beam_search only, which is refused",
    "media_io_kwargs": "is about images, sound and videos, which are refused",
    "metadata": "nothing of an answer is kept",
    "mm_payload": "is about images, sound and videos, which are refused",
    "mm_processor_kwargs": "is about images, sound and videos, which are refused",
    "prediction": "makes an answer faster, not another one",
    "return_mm_kwargs": "is about images, sound and videos, which are refused",
    "return_token_offsets": "counts on vLLM's render endpoints only",
    "safety_identifier": "nobody is watched",
    "service_tier": "there is one tier",
    "store": "nothing of an answer is kept",
}
"""Name: why no answer depends on it."""


@dataclass(frozen=True, slots=True)
class RefusedField:
    """`instead`: what a client can do. `neutral`: values beside null that ask for nothing, the field's defaults among
    them; they are taken."""

    instead: str
    neutral: tuple[object, ...] = ()


_NO_SOUND = RefusedField("answers are text; leave it out")

REFUSED: dict[str, RefusedField] = {
    "audio": _NO_SOUND,
    "best_of": RefusedField("use n", (1,)),
    "chat_template": RefusedField("the template is the model folder's"),
    "ec_transfer_params": RefusedField("the nodes hand KV over by themselves", ({},)),
    "function_call": RefusedField("use tool_choice", ("none", "auto")),
    "functions": RefusedField("use tools", ([],)),
    "guided_choice": RefusedField("use structured_outputs.choice"),
    "guided_decoding_backend": RefusedField("use structured_outputs; the engine chooses the library"),
    "guided_grammar": RefusedField("use structured_outputs.grammar"),
    "guided_json": RefusedField("use response_format or structured_outputs.json"),
    "guided_regex": RefusedField("use structured_outputs.regex"),
    "guided_whitespace_pattern": RefusedField("use structured_outputs.whitespace_pattern"),
    "kv_transfer_params": RefusedField("the nodes hand KV over by themselves", ({},)),
    "modalities": RefusedField("answers are text; leave it out", (["text"], [])),
    "moderation": RefusedField("there is none; leave it out"),
    "prompt_embeds": RefusedField("give the prompt as text or token ids"),
    "return_prompt_text": RefusedField("chats have it", (False,)),
    "routed_experts_prompt_start": RefusedField("no experts are returned", (0,)),
    "structural_tag": RefusedField("use response_format or structured_outputs.structural_tag"),
    "suffix": RefusedField("put what comes before and after into the prompt, in the model's own form", ("",)),
    "use_beam_search": RefusedField("use n", (False,)),
    "verbosity": RefusedField("ask for it in the prompt", ("medium",)),
    "watermarking": RefusedField("answers have no watermark", (False,)),
    "web_search_options": RefusedField("the web is not searched; leave it out"),
}
"""By name."""
