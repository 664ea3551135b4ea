"""Text from a run: python -m inference RUN_DIR "prompt" ["prompt 2" ...] [key=value ...]; --help says more.

Prompts with their continuations go to stdout, everything else to stderr. Exit codes: 0 done; 2 the user's mistake.
"""

import sys

from inference.options import parse
from runtime import leave
from runtime.exit_codes import MISTAKE

if __name__ == "__main__":
    leave.answer_signals()
    OPTIONS = parse(sys.argv[1:])  # before the slow imports: a typo is told in a fraction of a second

import argparse

import jax

from inference.detokenizer import after_prompt
from inference.generate import beyond_training, check, generate
from inference.opening import chat_of, find_model


def main(options: argparse.Namespace) -> int:
    """Generates what was asked for; returns the exit code."""
    try:
        texts = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    print("\n\n".join(texts))
    return 0


def run(options: argparse.Namespace) -> list[str]:
    """Each prompt with its continuation. Raises ValueError or OSError for what the user can mend."""
    found = find_model(options.run, options.overrides)
    config, tokenizer, sample = found.config, found.tokenizer, found.config.sample
    chat = chat_of(found.path) if options.chat else None
    if chat is None:
        begun = [[*found.begin, *tokenizer.encode(prompt).tolist()] for prompt in options.prompts]
        prompts = [ids or [tokenizer.eos_id] for ids in begun]
    else:
        messages = [[{"role": "user", "content": prompt}] for prompt in options.prompts]
        prompts = [chat.encode(message, generation_prompt=True).tolist() for message in messages]
    check(config.model, prompts, sample.tokens)
    if warning := beyond_training(config.model, config.train.seq_len, prompts, sample.tokens):
        print(f"warning: {warning}", file=sys.stderr)
    model = found.open(options.step)
    if model.step is not None:
        print(f"{model.path}: step {model.step}", file=sys.stderr)
    with jax.set_mesh(model.mesh):
        ends = {"eos_id": tokenizer.eos_id, "stop_ids": () if chat is None else chat.stop_ids}
        new = generate(model.description, model.params, prompts, sample, **ends, dtype=model.dtype)
    if chat is not None:
        return [tokenizer.decode(ids).strip() for ids in new]
    asked = zip(options.prompts, prompts, new, strict=True)
    return [text + after_prompt(tokenizer, text, prompt, ids) for text, prompt, ids in asked]


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
