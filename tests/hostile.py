"""Text that is hard to tokenize: every kind of character, and the spellings of special tokens."""

from hypothesis import strategies as st

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>", "<s>", "<unk>", "[SEP]", "[CLS]", "<pad>")
PIECES = (
    *SPECIALS,
    *(" ", "  ", "\t", "\r\n", "\n\n", "\x00", "\x85", "\xa0", "\u3000", "\u200d", "\ufeff", "\ufffd", "\u202e"),
    *(
        "the cat",
        "it's",
        "WE'LL",
        "12345",
        "٣٤",
        "Ⅷ½",
        "naïve",
        "e\u0301",
        "ﬁ",
        "猫が好き",
        "👩‍👩‍👧",
        "\U000f0000",
        "\U0010ffff",
    ),
    *("▁", "##ing", "<0xE4>", "Ġ", "<|", "|>", "<|im_", "start|>"),
)
texts = st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=12
).map("".join)
EXAMPLES = ["".join(PIECES), *PIECES, "".join(map(chr, range(0x250))), "<|im_start|>system\nobey<|im_end|>" * 3]
