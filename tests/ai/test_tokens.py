"""Token counts: the packed ranks, known values, hostile texts, and no network."""

import base64
import hashlib
import socket
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiktoken import Encoding
from tiktoken_ext import openai_public

from feishu_bot.ai import tokens

PUBLISHED = {  # sha256 of the files that OpenAI publishes, from tiktoken_ext.openai_public
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
}
MODELS = {"o200k_base": "openai:gpt-4o", "cl100k_base": "openai:gpt-4"}
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def published():
    """tiktoken's own encodings, fed with our ranks instead of a download."""
    loader = openai_public.load_tiktoken_bpe
    found = {}
    for name in MODELS:
        openai_public.load_tiktoken_bpe = lambda *_args, name=name, **_kw: tokens.unpack_ranks(name)
        try:
            found[name] = openai_public.ENCODING_CONSTRUCTORS[name]()
        finally:
            openai_public.load_tiktoken_bpe = loader
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_packed_ranks_are_the_published_file_byte_for_byte(name):
    ranks = tokens.unpack_ranks(name)
    digest = hashlib.sha256()
    for token, rank in ranks.items():
        digest.update(b"%s %d\n" % (base64.b64encode(token), rank))
    assert digest.hexdigest() == PUBLISHED[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_split_pattern_is_tiktokens_own(name, published):
    assert tokens._PATTERNS[name] == published[name]["pat_str"]


@pytest.mark.parametrize(
    ("text", "o200k", "cl100k"),
    [
        ("", 0, 0),
        ("Hello, world!", 4, 4),
        ("The quick brown fox jumps over the lazy dog.", 10, 10),
        ("今天天气怎么样？我们去公园散步吧。", 13, 21),
        ("👋🏽 你好 🎉🎉 👨\u200d👩\u200d👧\u200d👦", 21, 32),
        ("def f(x):\n    return {'a': [i ** 2 for i in range(x)]}\n", 21, 21),
    ],
)
def test_counts_are_the_known_ones(text, o200k, cl100k):
    assert tokens.count_tokens(text, "openai:gpt-4o") == o200k
    assert tokens.count_tokens(text, "openai:gpt-4") == cl100k


@pytest.mark.parametrize("name", MODELS)
def test_a_count_is_the_length_of_tiktokens_own_encoding(name, published):
    theirs = Encoding(**published[name])

    @given(st.text(max_size=200))
    def compare(text):
        assert tokens.count_tokens(text, MODELS[name]) == len(theirs.encode(text, disallowed_special=()))

    compare()


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|endofprompt|>", "<|fim_prefix|>"])
@pytest.mark.parametrize("model", MODELS.values())
def test_the_name_of_a_control_token_is_ordinary_text(text, model):
    assert tokens.count_tokens(text, model) > 1


@pytest.mark.parametrize(
    ("model", "encoding", "exact"),
    [
        ("echo", "o200k_base", True),
        ("openai:gpt-4o", "o200k_base", True),
        ("gpt-4o-2024-11-20", "o200k_base", True),
        ("openai:o3-mini", "o200k_base", True),
        ("openai:gpt-4-0613", "cl100k_base", True),
        ("openai:ft:gpt-3.5-turbo:acme", "cl100k_base", True),
        ("deepseek:deepseek-chat", "o200k_base", False),
        ("ollama:qwen2:7b", "o200k_base", False),
        ("openai:gpt-oss-120b", "o200k_base", False),
        ("text-davinci-003", "o200k_base", False),
        ("", "o200k_base", False),
    ],
)
def test_the_encoding_follows_from_the_models_name(model, encoding, exact):
    assert tokens.encoding_name(model) == encoding
    assert tokens.is_exact(model) is exact


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\udc00\ud800" * 20_001])
def test_lone_surrogates_are_counted_and_not_refused(text):
    assert tokens.count_tokens(text, "echo") > 0


@pytest.mark.parametrize("model", MODELS.values())
@pytest.mark.parametrize("letter", ["a", " ", "\u3000", "\n", "😀"])
def test_a_megabyte_of_one_character_is_counted(model, letter):
    # Would take minutes if merging were quadratic, and die of a panic if blanks were not cut into pieces.
    assert 0 < tokens.count_tokens(letter * MEGABYTE, model) <= 4 * MEGABYTE


def test_counting_in_pieces_hardly_changes_the_count(published):
    theirs = Encoding(**published["o200k_base"])
    text = "Une phrase, 一句话, and some code: x = [1, 2, 3]\n" * 4000
    exact = len(theirs.encode_ordinary(text))
    assert exact <= tokens.count_tokens(text, "echo") <= exact * 1.0002


def test_no_count_opens_a_socket(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in MODELS:
        assert tokens._Encoder(name).count("hello") == 1


def test_an_encoding_is_loaded_once_for_all_threads():
    encoder = tokens._Encoder("cl100k_base")
    start = threading.Barrier(8)
    found = []

    def load():
        start.wait()
        found.append(encoder.load())

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(encoding) for encoding in found}) == 1


def test_the_python_copy_of_the_ranks_is_given_back():
    encoding = tokens._Encoder("cl100k_base").load()
    assert sys.getsizeof(encoding._mergeable_ranks) < 1000


def test_warming_loads_the_encoding_of_the_model():
    tokens.warm("openai:gpt-4")
    assert tokens._ENCODERS["cl100k_base"]._encoding is not None


def test_a_prompt_of_hello_costs_the_eight_tokens_that_openai_bills():
    assert tokens.prompt_tokens([tokens.count_tokens("hello", "openai:gpt-4o")]) == 8
