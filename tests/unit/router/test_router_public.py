"""What of a prompt is public: whole chunks of declared texts, as a prompt's beginning or a chat's system message."""

import json
from pathlib import Path

import pytest

from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from router.requests.spec import ChatPrompt
from router.tenants.public import PublicPrefixes
from router.text.tokenizer import ByteTokenizer

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "sim-2p2d.yaml"


def public_text(**words: str) -> ClusterConfig:
    declared = f"security.keys.public=[{json.dumps(words)}]"
    return load_config(CONFIG, ["security.secret.env=S", "security.keys.env=K", declared])


def test_what_is_public_of_a_prompt_is_whole_chunks_of_what_it_has_in_common(tmp_path):
    text = "You are a helpful assistant. " * 5
    (tmp_path / "system.txt").write_text(text)
    tokenizer = ByteTokenizer(512)
    for words in ({"text": text}, {"file": str(tmp_path / "system.txt")}):
        public = PublicPrefixes.read(public_text(**words), tokenizer)
        size = public_text(**words).kv.chunk_tokens
        whole = tokenizer.encode(text)
        assert public.num_chunks(whole) == public.num_chunks([*whole, 1, 2]) == len(whole) // size > 1
        assert public.num_chunks([1, *whole]) == 0 and public.num_chunks([]) == 0
        assert public.num_chunks([*whole[:size], 1, *whole[size:]]) == 1
        chat = ChatPrompt([{"role": "system", "content": text}, {"role": "user", "content": "hi"}])
        assert public.num_chunks(tokenizer.encode(tokenizer.render_chat(chat))) == (len(whole) + 9) // size
    assert PublicPrefixes().num_chunks(whole) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"text": "short"}, "fills no chunk"),
        ({"file": "/no/such/file"}, "cannot be read"),
        ({}, "give one of text and file"),
    ],
)
def test_a_public_text_that_cannot_be_is_told_at_start(words, said):
    with pytest.raises(ConfigError, match=said):
        PublicPrefixes.read(public_text(**words), ByteTokenizer(512))
