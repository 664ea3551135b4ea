"""What a text must match: a JSON schema, any JSON object, a regular expression, a Lark grammar or one of some choices.

`written` makes the text that `Sampling.grammar` holds; `Grammars.matcher` turns it into a `Matcher`, which tells which
tokens may come next (llguidance). Grammars come from strangers: each is first tried in another process
(inference/grammar_trial.py), which may run out of stack, time or memory without harm to this one.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from data.tokenizer import Tokenizer
from inference.grammar_limits import LIMITS
from inference.grammar_trial import Trials

KINDS = ("json_schema", "json_object", "regex", "choice", "lark")
LONGEST = 16 << 10  # characters of a source
DEEPEST = 64  # brackets within each other
MOST_CHOICES = 500
KEPT = 64  # compiled grammars
LITERALS = re.compile(r'"(?:[^"\\\n]|\\.)*"|//.*|/(?:[^/\\\n]|\\.)*/')  # strings, comments, patterns of Lark


def written(kind: str, source: str = "") -> str:
    """The text of a grammar, for `Sampling.grammar`.

    source: the schema as JSON; nothing for json_object; the pattern, which has to match the whole text; a JSON list of
    strings; or Lark, whose text begins at `start`. Raises ValueError for what is too large or not well formed. Whether
    the grammar can be followed, `Grammars.matcher` finds.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind} is no kind of grammar: choose one of {', '.join(KINDS)}")
    if len(source) > LONGEST:
        raise ValueError(f"the {kind} has {len(source)} characters, more than {LONGEST}")
    if (depth := _depth(source)) > DEEPEST:
        raise ValueError(f"the {kind} has {depth} brackets within each other, more than {DEEPEST}")
    if kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"})
    if kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if kind == "lark":
        if "<" in LITERALS.sub("", source):
            raise ValueError("the lark asks for special tokens, which no text may have: '<' stands in literals only")
        return LLMatcher.grammar_from_lark(source)
    try:
        parsed = json.loads(source)
    except ValueError as error:
        raise ValueError(f"the {kind} is not JSON: {error}") from error
    if kind == "json_schema":
        if not isinstance(parsed, dict | bool):
            raise ValueError("a JSON schema is an object or true")
        # a schema's own settings for the compiler are a stranger's
        return LLMatcher.grammar_from_json_schema(_without_settings(parsed))
    if not (isinstance(parsed, list) and parsed and all(isinstance(c, str) and c for c in parsed)):
        raise ValueError("choice takes a list of strings, none of them empty")
    if len(parsed) > MOST_CHOICES:
        raise ValueError(f"choice has {len(parsed)} strings, more than {MOST_CHOICES}")
    # JSON spells strings as Lark does
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in dict.fromkeys(parsed)))


class Grammars:
    """Compiles grammars for one tokenizer. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, width: int):
        """width: tokens of the logits. Raises ValueError for a tokenizer whose tokens do not stand for bytes."""
        pieces = token_bytes(tokenizer)
        self._eos_id, self._ordinary_W = tokenizer.eos_id, _words([bool(piece) for piece in pieces], width)
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Spelled(pieces, tokenizer)), slices=LLTokenizer.json_slices())
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock, self._trials = threading.Lock(), Trials()

    def matcher(self, grammar: str, ends: Sequence[int] = ()) -> "Matcher":
        """A matcher at the beginning of a text. ends: tokens that end it, besides the end of the document.

        Raises ValueError where the grammar is wrong or takes too much.

        One that was not seen before takes up to a few seconds: not for a thread that others wait for.
        """
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None:  # others need not wait meanwhile
            self._trials.check(grammar)
            compiled = LLMatcher(self._tokenizer, grammar, limits=LIMITS, log_level=0)
            _raise_error_of(compiled)
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return Matcher(compiled.deep_copy(), self._ordinary_W, (self._eos_id, *ends))

    def close(self) -> None:
        """Ends the process in which grammars are tried."""
        self._trials.close()


class Matcher:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: LLMatcher, ordinary_W: np.ndarray, ends: Sequence[int]):
        self._matcher, self._ordinary_W, self._ends = matcher, ordinary_W, ends
        self.finished = False  # nothing more can come; the text is complete

    def copy(self) -> "Matcher":
        """Another one at the same place."""
        assert not self.finished
        return Matcher(self._matcher.deep_copy(), self._ordinary_W, self._ends)

    def mask(self) -> np.ndarray:
        """uint32 words of the tokens that may come next, as `inference.drawing.draw` takes them.

        The ends are among them exactly where the text may end; other special tokens never are. Raises ValueError where
        no token may come, or finding out takes too much.
        """
        allowed_W, bits = np.zeros_like(self._ordinary_W), np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        _raise_error_of(self._matcher)
        words = min(len(bits), len(allowed_W))
        allowed_W[:words] = bits[:words]
        allowed_W &= self._ordinary_W
        accepting = self._matcher.is_accepting()
        for end in self._ends:
            bit = np.uint32(1 << end % 32)
            allowed_W[end // 32] = allowed_W[end // 32] | bit if accepting else allowed_W[end // 32] & ~bit
        if not allowed_W.any():
            raise ValueError("no token of the vocabulary can follow in this grammar")
        return allowed_W

    def advance(self, token: int) -> bool:
        """Reads the token that was drawn; False if it may not come here. A token that ends the text changes nothing."""
        if token in self._ends:
            return self._matcher.is_accepting()
        if not self._matcher.consume_token(token):
            return False
        self.finished = self._matcher.is_stopped() and self._matcher.is_accepting()
        return True


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each token adds to a text, none of special and unused ones.

    Raises ValueError for a tokenizer whose tokens change each other's text, as those of words without spaces do.
    """
    pieces = [tokenizer.bytes_of(token) for token in range(tokenizer.vocab_size)]
    if None not in pieces:
        return pieces
    decoder = json.dumps(json.loads(tokenizer.as_json()).get("decoder"))
    if not any(f'"{name}"' in decoder for name in ("ByteFallback", "Metaspace")):
        raise ValueError("this model's tokens do not stand for bytes of their own: its text cannot follow a grammar")
    # the first token of a text may lose its space: each is decoded behind one that has a text
    anchor = next(t for t, piece in enumerate(pieces) if piece is None and tokenizer.decode([t]).strip())
    before = tokenizer.decode([anchor])
    text = lambda token: tokenizer.decode([anchor, token]).removeprefix(before).encode()
    return [text(token) if piece is None else piece for token, piece in enumerate(pieces)]


class _Spelled:
    """A tokenizer as llguidance asks for it. Special tokens have no names there, so no grammar asks for one."""

    bos_token_id = None

    def __init__(self, pieces: list[bytes], tokenizer: Tokenizer):
        self.tokens, self.eos_token_id, self._tokenizer = pieces, tokenizer.eos_id, tokenizer
        self.special_token_ids = [token for token, piece in enumerate(pieces) if not piece]
        self._ids = {piece: token for token, piece in enumerate(pieces) if piece}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are those of a text that has to come: as the model knows it, if that does not add any."""
        if not isinstance(text, str):
            raise TypeError("text is asked for, as a str")
        rest, greedy, ids = text.encode(), [], self._tokenizer.encode(text).tolist()
        if b"".join(self.tokens[token] for token in ids) == rest:
            return ids
        while rest:
            size = next((n for n in range(self._longest, 0, -1) if rest[:n] in self._ids), None)
            if size is None:
                break
            greedy.append(self._ids[rest[:size]])
            rest = rest[size:]
        return greedy


def _raise_error_of(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise ValueError("the grammar cannot be followed: " + matcher.get_error().partition("\n")[0][:300])


def _depth(source: str) -> int:
    """How many brackets are open at most; those in strings count, too."""
    depth = deepest = 0
    for character in source:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _without_settings(schema):
    if isinstance(schema, list):
        return [_without_settings(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _without_settings(part) for key, part in schema.items() if key != "x-guidance"}


def _words(bits: Sequence[bool], width: int) -> np.ndarray:
    """Bits as uint32 words, as many as the logits of `width` tokens need."""
    padded = np.zeros(-(-width // 32) * 32, bool)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view(np.uint32)
