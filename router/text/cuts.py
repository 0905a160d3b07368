"""Where a text may be cut so that the tokens of its parts, one after the other, are those of the whole. Pure.

Before a mark, by which chat templates begin their turns: a special token. Any tokenizer may be cut there that leaves no
step to the text as a whole (`marks`). Tokens that are not normalized are found first of all, leftmost and longest; what
lies between them is read piece by piece, each by itself. So the two sides of a cut read as the whole does where

1. none of these tokens, the mark included, can begin before the mark and end behind its beginning: the search finds the
   same ones before it, and goes on at it as at the beginning of a text;
2. neither the mark nor a token that begins as it does takes blanks from its left or asks what lies there, and the mark
   begins with punctuation, so that no token before it sees another letter there than the end of a text.

What is put before a text's first word alone is put before the first part's, as every other part begins with a mark.

Within words, between an ASCII letter and a blank or newline that another ASCII letter follows, or behind a newline that
stands alone between something and a letter. No tokenizer which `may_be_cut` says yes to joins what lies on the two
sides, and each side reads the same without the other:

1. Added tokens are found first. None of theirs has a blank in it or takes blanks with it, so none lies across.
2. NFC changes nothing there: blanks and newlines begin anew, and compose with nothing.
3. The words are found by one of `PATTERNS`, whose every match that has begun with a letter, or has one in it, ends
   before a blank or a newline, and whose every match that has a newline in it ends before a letter; all look ahead by
   one character at most, after blanks, and none looks back. What is done to words before that (digits by themselves)
   cuts no two letters apart, nor joins any.
4. Byte-pair merges happen within a word. Special tokens around the whole are left out here.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from string import punctuation

import msgspec

_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = frozenset({_CL100K % r"\p{N}{1,3}", _CL100K % r"\p{N}", _O200K})
"""As in the tokenizers of Llama 3, of Qwen 2 and 3, and of gpt-oss; that of GPT-2 is ByteLevel's own."""
_LETTERS = "A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"
"""That are letters in every version of Unicode: ASCII's, kana, Han and Hangul."""
_IN_WORDS = re.compile(rf"[A-Za-z](?=[ \n][A-Za-z])|(?<=\S)\n(?=[{_LETTERS}])")
_NO_CUT = re.compile(r"(?!)")


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
        if self.model.type != "BPE" or not self._has_parts:
            return False
        if not all(map(_stays_apart, self.added_tokens)):
            return False
        composes = self.normalizer is None or self.normalizer.get("type") == "NFC"
        return composes and _finds_words(self.pre_tokenizer)

    @property
    def marks(self) -> list[str]:
        """The special tokens before which a text may be cut."""
        if not self._has_parts:
            return []
        first = [token for token in self.added_tokens if token.get("normalized") is False and token.get("content")]
        contents = [str(token["content"]) for token in first]
        insides = "\0".join(content[1:] for content in contents)
        ends = {content[at:] for content in contents for at in range(1, len(content))}
        asking = [str(token["content"]) for token in first if token.get("lstrip") or token.get("single_word")]

        def is_mark(content: str) -> bool:
            overlaps = content in insides or any(content[:at] in ends for at in range(1, len(content) + 1))
            asks = any(other.startswith(content) for other in asking)
            return content[0] in punctuation and not overlaps and not asks

        return [content for content in contents if is_mark(content)]

    @property
    def _has_parts(self) -> bool:
        return not (self.model.dropout or self.truncation or self.padding)

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


class Cuts:
    """Where the texts of one tokenizer may be cut."""

    def __init__(self, file: TokenizerFile) -> None:
        self._in_words = _IN_WORDS if file.may_be_cut else _NO_CUT
        self._marks = re.compile(_any_of(marks)) if (marks := file.marks) else _NO_CUT

    def parts_of(self, text: str, least: int) -> list[str]:
        """The text, cut at the first place after each `least` characters, and at least one: what two texts begin with
        has the same parts, but for the last one."""
        parts: list[str] = []
        start = word = mark = 0
        while True:
            begin = start + max(1, least)
            if word <= begin:  # else the last one that was found is still to come
                word = found.end() if (found := self._in_words.search(text, begin)) else len(text)
            if mark < begin:
                mark = found.start() if (found := self._marks.search(text, begin)) else len(text)
            if (end := min(word, mark)) >= len(text):
                return [*parts, text[start:]]
            parts.append(text[start:end])
            start = end


def _any_of(words: Sequence[str]) -> str:
    """A pattern that finds where any of them begins. A tree, as there may be thousands that begin alike."""
    tails: dict[str, list[str]] = {}
    for word in words:
        tails.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + ("" if "" in rest else _any_of(rest)) for first, rest in tails.items()]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


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
