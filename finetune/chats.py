"""Dialogues as tokens, and which of them count."""

from collections.abc import Sequence

import numpy as np

from data.chat import ChatTemplate, open_chat
from finetune.table import Row
from finetune.task import Setup


def chat_template(setup: Setup, path: str) -> ChatTemplate:
    """The template at a path, or of the run's tokenizer. Raises ValueError where there is none."""
    path = path or setup.tokenizer_path
    if not path:
        raise ValueError(
            "there is no chat template: begin from weights that have one, or set task.options.template=PATH"
        )
    return open_chat(path, setup.tokenizer)


def messages_of(row: Row, role: str) -> list[dict]:
    """A list of {role, content}: content is a text or a list of parts, and may be missing beside tool_calls only.

    Raises ValueError for anything else.
    """
    value = row.values.get(role)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{role}: no list of messages with role and content")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{role}: a message without a role")
        content = message.get("content")
        parts = isinstance(content, list) and content and all(isinstance(part, dict) for part in content)
        if not (isinstance(content, str) or parts or (content is None and message.get("tool_calls"))):
            raise ValueError(f"{role}: a message whose content is neither a text nor a list of parts")
    return value


def marked(
    template: ChatTemplate, messages: list[dict], roles: Sequence[str], *, last: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a dialogue, and bool of each whether it is what one of `roles` says; `last`: in the last message only.

    Raises ValueError where the template changes what stands before a message once that is there.
    """
    whole = template.encode(messages)
    counts = np.zeros(len(whole), bool)
    for place, message in enumerate(messages):
        if message["role"] not in roles or (last and place < len(messages) - 1):
            continue
        generates = message["role"] == "assistant"
        before = template.encode(messages[:place], generation_prompt=generates) if place else whole[:0]
        after = template.encode(messages[: place + 1])
        same = np.array_equal(after[: len(before)], before) and np.array_equal(whole[: len(after)], after)
        if not same:
            raise ValueError("the template rewrites what was said before")
        counts[len(before) : len(after)] = True
    if not counts.any():
        raise ValueError(f"nothing is said by {', '.join(roles)}")
    return whole, counts
