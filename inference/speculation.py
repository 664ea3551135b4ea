"""Tokens that may come next, proposed cheaply, so that one step of the model checks several.

The model draws after every proposal what it would have drawn anyway: by the same rule, with the random numbers of the
same position. Proposals are kept as far as they are what was drawn. So the text is the same with and without them,
greedy or sampled; only the number of steps differs. (Proposals: Leviathan et al. 2023, arXiv 2211.17192.)
"""

from collections.abc import Sequence

from inference.requests import Sampling

LOOKED_UP = 3  # tokens that have to be the same as before


class NgramProposer:
    """Proposes what followed the last time that a sequence had the tokens it ends with (prompt look-up)."""

    def __init__(self):
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> place after them, the last one
        self._noted = LOOKED_UP  # ends of runs of tokens before this are in there

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow; `tokens` only grow from call to call."""
        end = len(tokens)
        for place in range(self._noted, end):
            self._after[tuple(tokens[place - LOOKED_UP : place])] = place
        self._noted = max(self._noted, end)
        place = self._after.get(tuple(tokens[-LOOKED_UP:]))
        draft: list[int] = []
        for at in range(place, place + most) if place is not None else ():
            draft.append(tokens[at] if at < end else draft[at - end])  # a repetition goes on
        return draft


def may_speculate(sampling: Sampling) -> bool:
    """Whether several tokens of a request can be checked in one step: not where a draw depends on the tokens that the
    same step draws, by a penalty or a grammar.
    """
    penalties = (sampling.repetition_penalty != 1, sampling.presence_penalty != 0, sampling.frequency_penalty != 0)
    return sampling.grammar is None and not any(penalties)


def accepted(drafted: Sequence[int], drawn: Sequence[int]) -> list[int]:
    """The tokens of a step: of those drawn, one a place, the ones before which every proposal was right."""
    right = next((i for i, (a, b) in enumerate(zip(drafted, drawn, strict=False)) if a != b), len(drafted))
    return list(drawn[: right + 1])
