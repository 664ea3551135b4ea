"""The books of the cache: no block is lost, none is written while another reads it, prefixes are found exactly."""

from hypothesis import given, settings
from hypothesis import strategies as st

from inference.cache import Blocks

TOKENS = st.lists(st.integers(0, 1), min_size=0, max_size=24)


def test_full_blocks_are_found_by_their_tokens_and_all_before():
    blocks = Blocks(8, 4)
    tokens = list(range(10))
    names = blocks.names(tokens)
    assert len(names) == 2
    held = blocks.take(3)
    for block, name in zip(held, names, strict=False):
        blocks.name(block, name)
    assert blocks.find(names) == held[:2]
    assert blocks.find(blocks.names([*range(4), 9, 9, 9, 9])) == held[:1]
    assert blocks.find(blocks.names([9, *tokens[1:8]])) == []  # the second block has the same tokens, but not before it
    assert blocks.names(tokens, names[:1]) == names


def test_what_is_released_stays_until_its_place_is_needed_the_longest_unused_first():
    blocks = Blocks(4, 1)
    held = blocks.take(4)
    names = blocks.names([1, 2, 3, 4])
    for block, name in zip(held, names, strict=True):
        blocks.name(block, name)
    blocks.release(held)
    assert (blocks.available, blocks.cached) == (4, 4)
    assert blocks.take(1) == [held[3]], "the end of a sequence goes before its beginning"
    assert blocks.find(names) == held[:3]
    blocks.hold(held[:1])
    assert blocks.take(2) == [held[2], held[1]]
    assert blocks.take(1) is None
    assert blocks.find(names) == held[:1]


def test_without_sharing_nothing_is_found():
    blocks = Blocks(4, 2, sharing=False)
    (block,) = blocks.take(1)
    blocks.name(block, blocks.names([1, 2])[0])
    blocks.release([block])
    assert blocks.find(blocks.names([1, 2])) == []
    assert (blocks.available, blocks.cached) == (4, 0)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.booleans(), TOKENS), max_size=40))
def test_no_block_is_lost_or_has_two_writers(events):
    """Sequences begin with what is there of their tokens, write the rest, and end in any order."""
    blocks, content, running = Blocks(12, 2), {}, []
    for begins, tokens in events:
        if begins or not running:
            names = blocks.names(tokens)
            found = blocks.find(names)
            blocks.hold(found)
            for end, block in enumerate(found, 1):
                assert content[block] == tokens[: 2 * end], "a block holds what its name says"
            taken = blocks.take(blocks.blocks_for(len(tokens)) - len(found))
            if taken is None:
                blocks.release(found)
                continue
            for other in running:
                assert not set(taken) & set(other), "somebody reads what is written now"
            mine = [*found, *taken]
            for end, (block, name) in enumerate(zip(mine, names, strict=False), 1):
                content[block] = tokens[: 2 * end]
                blocks.name(block, name)
            running.append(mine)
        else:
            blocks.release(running.pop(len(tokens) % len(running)))
        assert blocks.available == 12 - len({block for mine in running for block in mine})
    for mine in running:
        blocks.release(mine)
    assert blocks.available == 12
    assert sorted(blocks.take(12)) == list(range(12))
