"""The lm-evaluation-harness with a model on the mesh: requests are encoded as by its own adapter for transformers."""

from collections.abc import Callable, Sequence

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data.tokenizer import Tokenizer
from evaluation.generation import Sampling, generate_until
from evaluation.scoring import Progress, Row, Scorer
from inference.detokenizer import after_prompt

MAX_NEW_TOKENS = 256  # where a task does not say, as in the harness


class MeshModel(TemplateLM):
    """Answers the harness. Use it inside `jax.set_mesh` of the scorer's mesh.

    reach: tokens of the longest input; what is longer loses its beginning. begin: tokens before every text that the
    model wants, as published ones do. What stands behind an empty context follows `begin`, or the end of a document.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        reach: int,
        begin: Sequence[int] = (),
        progress: Callable[[str], Progress] = lambda what: lambda done, total: None,
    ):
        super().__init__()
        self.scorer, self.text, self.max_length, self.begin = scorer, tokenizer, reach, list(begin)
        self.progress = progress

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a continuation without a context is asked for behind."""
        return self.begin[0] if self.begin else self.text.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Tells one tokenizer from another."""
        return self.text.digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text, behind `begin` unless that is forbidden."""
        ids = self.text.encode(string).tolist()
        return ids if add_special_tokens is False else self.begin + ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation behind its context, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of (text, context's tokens, continuation's tokens). Equal inputs are read once."""
        rows, places, asked = [], {}, []
        targets: list[list[tuple[int, int]]] = []
        for _, context, continuation in requests:
            if not continuation:
                asked.append((0, 0, 0))
                continue
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is longer than the {self.max_length} that the model "
                    "reads at once; set --window higher"
                )
            ids = (list(context) + list(continuation))[-(self.max_length + 1) :]
            number = places.setdefault(tuple(ids[:-1]), len(rows))
            if number == len(rows):
                rows.append(ids[:-1])
                targets.append([])
            first = len(ids) - 1 - len(continuation)
            asked.append((number, len(targets[number]), len(continuation)))
            targets[number] += [(first + i, token) for i, token in enumerate(continuation)]
        made = [
            Row(np.array(ids, np.int32), *np.array(these, np.int32).T) for ids, these in zip(rows, targets, strict=True)
        ]
        scores = self.scorer.scores_of(made, self.progress("log-likelihoods"))
        found = []
        for number, first, count in asked:
            part = slice(first, first + count)
            nll_C = scores[number].nll_C[part].astype(np.float64) if count else np.zeros(0)
            found.append((-float(nll_C.sum()), bool(scores[number].correct_C[part].all()) if count else True))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows that do not overlap but for their last."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            cut = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(number)
        found = np.zeros(len(requests))
        answers = self._loglikelihood_tokens(windows)
        np.add.at(found, np.array(owners, int), [likelihood for likelihood, _ in answers])
        return found.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first stop string. Requests of one kind go together."""
        found: dict[int, str] = {}
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        for numbers in kinds.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], MAX_NEW_TOKENS)
            texts = self.write([requests[number].args[0] for number in numbers], settings)
            found |= dict(zip(numbers, texts, strict=True))
        return [found[number] for number in range(len(requests))]

    def write(self, contexts: list[str], settings: dict) -> list[str]:
        """What the model writes behind each context; settings: until, max_gen_toks, do_sample, temperature, ...

        Raises ValueError where a task asks for as many new tokens as the model reads at once.
        """
        tokens, until = settings["max_gen_toks"], [stop for stop in settings["until"] if stop]
        room = self.max_length - tokens
        if room < 1:
            raise ValueError(
                f"a task asks for {tokens} new tokens and the model reads {self.max_length} at once: nothing is left "
                "for the prompt; set --window higher"
            )
        prompts = [(self.tok_encode(context) or [self.prefix_token_id])[-room:] for context in contexts]
        text = lambda number, ids: after_prompt(self.text, contexts[number], prompts[number], ids)
        ended = lambda number, ids: any(stop in text(number, ids) for stop in until)
        sampling = Sampling()
        if settings.get("do_sample"):
            top_k, top_p = int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0)
            sampling = Sampling(float(settings["temperature"]) or 1.0, top_k, top_p)
        new = generate_until(
            *(self.scorer, prompts, tokens, ended),
            eos_id=self.eot_token_id, sampling=sampling, progress=self.progress("texts"),
        )  # fmt: skip
        return [postprocess_generated_text(text(number, ids), until, None) for number, ids in enumerate(new)]
