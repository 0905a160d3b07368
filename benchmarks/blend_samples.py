"""Prompts with documents of three sources, by turns: texts with a planted fact, a FAQ, and stories with questions.

Debian's reference and FAQ are Debian packages: debian-reference-en and debian-faq (apt-get install). The stories and
their questions are the set "theory_of_mind" in the wheel of inspect-ai (MIT; pip install --no-deps inspect-ai).
"""

import html
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

REFERENCE, FAQ = Path("/usr/share/debian-reference"), Path("/usr/share/doc/debian/FAQ")
SOURCES = ("reference", "faq", "stories")
HEADER = (
    "You are a careful assistant. Read the documents below and answer the question that follows them in a few words.\n"
)
_SHIPS = ("Aldgate", "Brimley", "Corvus", "Dunmore", "Elstow", "Farrow", "Gosport", "Harwich", "Ilford", "Jarrow")
_FACTS = {
    "captain": ("Maria Lopez", "John Becker", "Ann Fisher", "Peter Novak", "Lucy Grant", "Tom Hale"),
    "colour": ("green", "yellow", "purple", "orange", "black", "white"),
    "harbour": ("Dover", "Calais", "Bergen", "Oslo", "Genoa", "Porto"),
    "cargo": ("apples", "timber", "coal", "salt", "wool", "copper"),
}
_PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.DOTALL)
_ENTRY = re.compile(r'<h[23][^>]*class="title"[^>]*>(.*?)</h[23]>(.*?)(?=<h[1-3][^>]*class="title"|\Z)', re.DOTALL)
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Sample:
    """A header, documents in the order of the prompt, and what stands behind them; by tokens."""

    source: str
    header: list[int]
    documents: list[list[int]]
    tail: list[int]
    fact: str = ""
    """The word that a right answer has; empty: nobody can tell."""

    @property
    def prompt(self) -> list[int]:
        """All of it."""
        return self.header + [token for document in self.documents for token in document] + self.tail

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each document stands: [start, end)."""
        at, spans = len(self.header), []
        for document in self.documents:
            spans.append((at, at + len(document)))
            at += len(document)
        return spans


class Samples:
    """Made of a number alone, the same each time. `encode`: of the model's tokenizer, without special tokens."""

    def __init__(self, encode: Encode) -> None:
        for folder, package in ((REFERENCE, "debian-reference-en"), (FAQ, "debian-faq")):
            if not folder.is_dir():
                raise SystemExit(f"{folder} is not there: apt-get install {package}")
        self._encode = encode
        pages = [page.read_text() for page in sorted(REFERENCE.glob("ch*.en.html"))]
        every = [_plain(text) for page in pages for text in _PARAGRAPH.findall(page)]
        self._paragraphs = [text for text in every if len(text) > 150]
        entries = [pair for page in sorted(FAQ.glob("*.en.html")) for pair in _ENTRY.findall(page.read_text())]
        self._entries = [(re.sub(r"^[\d.]+ ", "", _plain(title)), _plain(body)) for title, body in entries]
        self._stories = _stories()

    def one(self, number: int, tokens: int = 300, count: int = 3) -> Sample:
        """With so many documents of about so many tokens; the sources by turns."""
        chance = random.Random(1000 + number)
        if (source := SOURCES[number % len(SOURCES)]) == "faq":
            return self._of_faq(chance, tokens, count)
        if source == "reference":
            return self._of_reference(chance, tokens, count)
        return self._of_stories(number // len(SOURCES), chance, tokens, count)

    def _of_reference(self, chance: random.Random, tokens: int, count: int) -> Sample:
        ships, (thing, values) = chance.sample(_SHIPS, count), chance.choice(sorted(_FACTS.items()))
        said = chance.sample(values, count)
        documents = []
        for ship, value in zip(ships, said, strict=True):
            fact = self._encode(f" The {thing} of the ship {ship} is {value}. ")
            room, text = tokens - len(fact), f"\nDocument {ship}:"
            while len(ids := self._encode(text)) < room:
                text = f"{text} {chance.choice(self._paragraphs)}"
            cut = chance.randrange(room // 4, room - 20)
            documents.append(ids[:cut] + fact + ids[cut:room])
        asked = chance.randrange(count)
        of = f"{thing} of the ship {ships[asked]}"
        asks = f"\n\nQuestion: What is the {of}?\nAnswer: The {of} is"
        return Sample("reference", self._encode(HEADER), documents, self._encode(asks), said[asked].split()[0])

    def _of_faq(self, chance: random.Random, tokens: int, count: int) -> Sample:
        documents, titles = [], []
        for _ in range(count):
            title, body = chance.choice(self._entries)
            titles.append(title)
            text = f"\n{title}\n{body}\n"
            while len(ids := self._encode(text)) < tokens:
                text += "\n{}\n{}\n".format(*chance.choice(self._entries))
            documents.append(ids[:tokens])
        asks = f"\n\nQuestion: {chance.choice(titles)}\nAnswer:"
        return Sample("faq", self._encode(HEADER), documents, self._encode(asks))

    def _of_stories(self, number: int, chance: random.Random, tokens: int, count: int) -> Sample:
        story, question, answer = self._stories[number % len(self._stories)]
        others = sorted({other for other, _, _ in self._stories} - {story})
        chance.shuffle(others)
        texts = [[story], *([] for _ in range(count - 1))]
        for text in texts:
            while others and len(self._encode(_paragraphs([*text, others[-1]]))) <= tokens:
                text.append(others.pop())
            chance.shuffle(text)
        chance.shuffle(texts)
        documents = [self._encode(_paragraphs(text)) for text in texts]
        asks = f"\n\nQuestion: {question}\nAnswer: In the"
        return Sample("stories", self._encode(HEADER), documents, self._encode(asks), answer)


def _stories() -> list[tuple[str, str, str]]:
    """Each question: its story, itself, and the answer's word."""
    spec = find_spec("inspect_ai")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("inspect_ai is not there: pip install --no-deps inspect-ai")
    file = Path(spec.submodule_search_locations[0]) / "dataset/_examples/theory_of_mind.jsonl"
    every = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [(one["input"][0]["content"].rpartition(". "), one["target"]) for one in every]
    return [(f"{story}.", question, answer) for (story, _, question), answer in texts]


def _paragraphs(stories: list[str]) -> str:
    return "".join(f"\n{story}\n" for story in stories)


def _plain(marked: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", marked))).strip()
