"""Tries a stranger's grammar in a process of its own before this one follows it.

A compiler of grammars recurses: a chain of 4,000 rules overflows its stack, which ends the process. Some patterns of
2 kB take seconds a token. What ends the other process, or takes it longer than a limit, is refused.
"""

import json
import os
import resource
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from inference.grammar_limits import LIMITS

SECONDS = 2.0  # for one grammar
SECONDS_TO_START = 30.0
STEPS = 64  # bytes of a text that are tried
MEMORY = 2 << 30  # bytes of address space
STACK = 1 << 20  # bytes; threads of the server have 8 times more


class Trials:
    """The process in which grammars are tried, started when it is first needed and again when one ended it."""

    def __init__(self):
        self._process, self._lock = None, threading.Lock()

    def check(self, grammar: str) -> None:
        """Raises ValueError where the grammar is wrong, or takes too much time, stack or memory."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                self._process.stdin.write(json.dumps(grammar).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:
                pass  # it has ended, which reading finds
            answer = self._read(SECONDS)
        if answer is None:
            raise ValueError(
                f"the grammar takes more than {SECONDS:g} s, {STACK >> 20} MiB of stack or too much memory"
            )
        if answer:
            raise ValueError(f"the grammar cannot be followed: {answer}")

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        self.close()
        root = Path(__file__).parent.parent
        command, environment = [sys.executable, "-m", "inference.grammar_trial"], {"PATH": os.environ.get("PATH", "")}
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        self._process = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.DEVNULL, **pipes)
        if self._read(SECONDS_TO_START) != "":
            raise RuntimeError("the process that tries grammars does not start")

    def _read(self, seconds: float) -> str | None:
        """A line of the process, or None (and its end) where none comes in time."""
        received, until = b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if not selector.select(max(0, until - time.monotonic())):
                    break
                if not (more := os.read(self._process.stdout.fileno(), 1 << 16)):
                    break
                received += more
        if received.endswith(b"\n"):
            return json.loads(received)
        self.close()
        return None


class _Bytes:
    """A tokenizer of bytes: what a grammar costs does not depend much on the words of a real one."""

    bos_token_id, eos_token_id, special_token_ids = None, 256, (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"")

    def __call__(self, text):
        return list(text.encode())


def problem_of(grammar: str, tokenizer: LLTokenizer) -> str:
    """What is wrong with a grammar, or "": it is compiled and followed for some bytes, the rare ones first."""
    matcher = LLMatcher(tokenizer, grammar, limits=LIMITS, log_level=0)
    for step in range(STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        bits = matcher.compute_bitmask()
        allowed = [byte for byte in range(256) if bits[byte // 8] >> byte % 8 & 1]
        if not allowed:
            break
        matcher.consume_token(allowed[step * 7919 % len(allowed)])
    return matcher.get_error().partition("\n")[0][:300]


def main() -> None:
    """Answers each line, a grammar as a JSON string, with a line: its problem as a JSON string."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()))
    print(json.dumps(""), flush=True)
    for line in sys.stdin:
        print(json.dumps(problem_of(json.loads(line), tokenizer)), flush=True)


if __name__ == "__main__":
    threading.stack_size(STACK)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
