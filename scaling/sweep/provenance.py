"""Where a run's numbers come from: which code, which machine."""

import ast
import contextlib
import hashlib
import os
import platform
import subprocess
from pathlib import Path

# What decides a run's numbers; comments, docstrings and layout of the code do not.
SOURCES = ("train.py", "config", "runtime", "model", "parallel", "data", "training", "checkpoint")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_digest(root: Path) -> str:
    """SHA-256, cut to 12 digits, of the syntax trees of SOURCES: what is no code does not count."""
    digest = hashlib.sha256()
    for name in SOURCES:
        for path in sorted([root / name] if name.endswith(".py") else (root / name).rglob("*.py")):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                    del node.body[0]
            digest.update(f"{path.relative_to(root)} {ast.dump(tree)}".encode())
    return digest.hexdigest()[:12]


def machine() -> str:
    """This machine in words: its processor and how many cores this process may use."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {len(cores())} cores"


def cores() -> list[int]:
    """The numbers of the cores that this process may use, ascending."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def commit(root: Path) -> str:
    """The commit of the checkout, with + where files differ from it; "unknown" without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
