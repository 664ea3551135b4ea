"""How `key=value` is spelled so that a shell and then Hydra hand back the very text that was meant."""

import re
import shlex

PLAIN = re.compile(r"[A-Za-z_/][\w/.-]*", re.ASCII)  # what needs no quotes, unless it is one of these words:
WORDS = ("null", "true", "false", "inf", "nan")


def override(key: str, text: str) -> str:
    """The argument `key=text` of train.py whose value is this text, whatever stands in it."""
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return f"{key}={text}"
    # backslashes escape quotes, and only in front of them; a dollar with a brace would look up another key
    quoted = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), text)
    quoted = re.sub(r"(\\*)\$\{", lambda m: 2 * m[1] + "\\${", quoted)
    return f'{key}="{quoted}"'


def pasted(key: str, text: str) -> str:
    """`override` as a word to paste into a shell."""
    return shlex.quote(override(key, text))
