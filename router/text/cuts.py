"""Where a text may be cut so that the tokens of its parts, one after the other, are those of the whole. Pure.

A cut lies between an ASCII letter and a blank or newline that another ASCII letter follows. No tokenizer which
`may_be_cut` says yes to joins what lies on its two sides, and each side reads the same without the other:

1. Added tokens are found first. None of theirs has a blank in it or takes blanks with it, so none lies across.
2. NFC changes nothing there: a blank begins anew, and composes with nothing.
3. The words are found by one of `PATTERNS`, whose every match that has begun with a letter, or has one in it, ends
   before a blank or a newline; all look ahead by one character at most, after blanks, and none looks back. What is
   done to words before that (digits by themselves) cuts no two letters apart, nor joins any.
4. Byte-pair merges happen within a word. Special tokens around the whole are left out here.
"""

import re
from collections.abc import Mapping
from functools import cached_property

import msgspec

_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = frozenset({_CL100K % r"\p{N}{1,3}", _CL100K % r"\p{N}", _O200K})
"""As in the tokenizers of Llama 3, of Qwen 2 and 3, and of gpt-oss; that of GPT-2 is ByteLevel's own."""
_CUT = re.compile(r"[A-Za-z](?=[ \n][A-Za-z])")


class _FileModel(msgspec.Struct):
    type: str = ""
    dropout: float | None = None


class TokenizerFile(msgspec.Struct, dict=True):
    """What this module looks at in a `tokenizer.json`."""

    model: _FileModel
    added_tokens: list[dict[str, object]] = []
    normalizer: dict[str, object] | None = None
    pre_tokenizer: dict[str, object] | None = None
    post_processor: dict[str, object] | None = None
    truncation: dict[str, object] | None = None
    padding: dict[str, object] | None = None

    @cached_property
    def may_be_cut(self) -> bool:
        """Whether all of the above holds for it. What is not known here may not be cut."""
        if self.model.type != "BPE" or self.model.dropout or self.truncation or self.padding:
            return False
        if not all(map(_stays_apart, self.added_tokens)):
            return False
        composes = self.normalizer is None or self.normalizer.get("type") == "NFC"
        return composes and _finds_words(self.pre_tokenizer)

    @cached_property
    def around(self) -> tuple[list[int], list[int]] | None:
        """The special tokens before and after every text. None: what it adds is not known here."""
        added: tuple[list[int], list[int]] = [], []
        for step in _steps(self.post_processor, "processors"):
            if step.get("type") == "TemplateProcessing":
                if any(added) or (found := _template(step)) is None:
                    return None
                added = found
            elif step.get("type") != "ByteLevel":
                return None
        return None if self.truncation or self.padding else added


def read_tokenizer_file(raw: bytes) -> TokenizerFile:
    """Of a file that the library has read; one in another form says no to everything."""
    try:
        return msgspec.json.decode(raw, type=TokenizerFile)
    except msgspec.DecodeError:
        return TokenizerFile(_FileModel(), padding={"unknown": True})


def parts_of(text: str, least: int) -> list[str]:
    """The text, cut at the first place after each `least` characters: what two texts begin with has the same parts,
    but for the last one."""
    parts, start = [], 0
    while (found := _CUT.search(text, start + least)) is not None:
        parts.append(text[start : found.end()])
        start = found.end()
    parts.append(text[start:])
    return parts


def _stays_apart(token: Mapping[str, object]) -> bool:
    content = token.get("content")
    if not isinstance(content, str) or not content or any(letter.isspace() for letter in content):
        return False
    return not any(token.get(name) for name in ("lstrip", "rstrip", "single_word"))


def _steps(step: Mapping[str, object] | None, inner: str) -> list[Mapping[str, object]]:
    """Of a processor that may be a sequence of them. What has another form is one that nobody knows."""
    if step is None:
        return []
    steps = step.get(inner) if step.get("type") == "Sequence" else [step]
    return [each if isinstance(each, Mapping) else {} for each in steps] if isinstance(steps, list) else [{}]


def _finds_words(pre_tokenizer: Mapping[str, object] | None) -> bool:
    """Whether it is made of the steps that are known here, one of which finds words."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    return all(map(_is_known, steps)) and any(map(_cuts_words, steps))


def _is_known(step: Mapping[str, object]) -> bool:
    if step.get("type") == "ByteLevel":
        return step.get("add_prefix_space") is False
    return step.get("type") == "Digits" or _cuts_words(step)


def _cuts_words(step: Mapping[str, object]) -> bool:
    if step.get("type") == "ByteLevel":
        return step.get("use_regex", True) is True
    pattern = step.get("pattern")
    known = isinstance(pattern, Mapping) and pattern.get("Regex") in PATTERNS
    plain = step.get("behavior") == "Isolated" and step.get("invert") is False
    return step.get("type") == "Split" and known and plain


class _SpecialIds(msgspec.Struct):
    ids: list[int]


class _NamedPart(msgspec.Struct):
    id: str


class _TemplateItem(msgspec.Struct):
    SpecialToken: _NamedPart | None = None
    Sequence: _NamedPart | None = None


class _TemplateStep(msgspec.Struct):
    single: list[_TemplateItem]
    special_tokens: dict[str, _SpecialIds]


def _template(step: Mapping[str, object]) -> tuple[list[int], list[int]] | None:
    """What a TemplateProcessing adds before and after a text that is by itself."""
    try:
        template = msgspec.convert(step, _TemplateStep)
        texts = [number for number, item in enumerate(template.single) if item.Sequence is not None]
        names = [item.SpecialToken.id if item.SpecialToken else "" for item in template.single]
        ids = {name: template.special_tokens[name].ids if name else [] for name in names}
    except (msgspec.ValidationError, KeyError):
        return None
    if len(texts) != 1:
        return None
    before, after = names[: texts[0]], names[texts[0] :]
    return [one for name in before for one in ids[name]], [one for name in after for one in ids[name]]
