"""Holds what real compilers make of fixed training steps: their collectives, and their memory.

    make test-aot                                                     # the guarded steps of all platforms
    .venv-aot-gpu/bin/python -m tests.aot.golden gpu --write          # all steps of a platform, kept as they are now
    .venv-aot-gpu/bin/python -m tests.aot.golden gpu --write h200-pipe

Exit code 1 where a guarded step has changed, with what to do. The steps are those of tests/aot/cases.py.
"""

import importlib
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version

from runtime import compiler_flags

if __name__ == "__main__":
    if sys.argv[1:2] not in (["cpu"], ["gpu"], ["tpu"]):
        print("error: python -m tests.aot.golden cpu|gpu|tpu [--write] [STEP ...]", file=sys.stderr)
        sys.exit(2)
    os.environ.update(compiler_flags.ENVIRONMENT[sys.argv[1]])
    if sys.argv[1] == "cpu":
        importlib.import_module("tests.conftest")  # the flags of all tests, one of which compiles the same
import json

from planner.compiled_step import compiled
from runtime.files import replace_text
from tests.aot.cases import CASES, FOLDER, kept

TOLERANCE = 0.02  # of memory; collectives must be the same, their bytes to as much
COMPILERS = {"cpu": "jaxlib", "gpu": "jax-cuda13-pjrt", "tpu": "libtpu"}


def asked(name: str) -> dict:
    """What the compiler says of a case now."""
    case = CASES[name]
    found = compiled(case.question())
    versions = {}
    for package in ("jax", COMPILERS[case.platform]):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    found["seconds"] = round(found["seconds"], 1)
    return {"settings": case.settings, "versions": versions} | found


def changes(name: str, now: dict, before: dict | None) -> list[str]:
    """What has changed, in lines for people; empty: nothing that counts."""
    platform = CASES[name].platform
    write = f"python -m tests.aot.golden {platform} --write {name}"
    if before is None:
        return [f"{name} has never been kept: run `{write}` in .venv-aot-{platform} and commit the file"]
    found = []
    for part in ("arguments", "temporary"):
        if abs(now[part] - before[part]) > TOLERANCE * before[part]:
            share = now[part] / before[part] - 1
            found.append(f"{part} {before[part] / 1e6:,.1f} -> {now[part] / 1e6:,.1f} MB a device ({share:+.1%})")
    of = lambda rows: {(r["kind"], *r["axes"], r["asynchronous"]): (r["times"], r["bytes"]) for r in rows}
    old, new = of(before["collectives"]), of(now["collectives"])
    for key in dict.fromkeys((*old, *new)):
        (times, size), (times_now, size_now) = old.get(key, (0, 0.0)), new.get(key, (0, 0.0))
        if times != times_now or abs(size_now - size) > TOLERANCE * size:
            kind, *axes, apart = key
            said = f"{kind} over {' '.join(axes)}{' (asynchronous)' if apart else ''}"
            found.append(f"{said}: {times} x, {size / 1e6:,.2f} MB -> {times_now} x, {size_now / 1e6:,.2f} MB")
    if not found:
        return []
    same = now["versions"] == before["versions"]
    why = (
        "the compiler is the same, so this project's program changed: mend it, or, if the change is meant,"
        if same
        else f"the compiler changed from {before['versions']} to {now['versions']}: if nothing got worse,"
    )
    environment = "" if platform == "cpu" else f" in .venv-aot-{platform}"
    return [f"{name} has changed:", *(f"  {line}" for line in found), f"  {why} keep it by `{write}`{environment}"]


def write(name: str, now: dict) -> None:
    """Keeps what a compiler said."""
    FOLDER.mkdir(exist_ok=True)
    replace_text(FOLDER / f"{name}.json", json.dumps(now, indent=1) + "\n")


def main(platform: str, *words: str) -> int:
    """Asks the compiler of a platform; returns the exit code."""
    names = [word for word in words if word != "--write"]
    ours = [name for name, case in CASES.items() if case.platform == platform]
    if unknown := set(names) - set(ours):
        print(f"error: unknown cases {' '.join(sorted(unknown))}; {platform} has {' '.join(ours)}", file=sys.stderr)
        return 2
    keep = "--write" in words
    chosen = names or [name for name in ours if keep or CASES[name].guarded]
    if not chosen:
        print(f"no step of {platform} is guarded: mark one in tests/aot/cases.py, and keep it with --write")
        return 0
    failures = 0
    for name in chosen:
        began = time.perf_counter()
        now = asked(name)
        needed = (now["arguments"] + now["temporary"] + now["code"]) / 1e9
        print(f"{name:18} {needed:8.3f} GB a device, {time.perf_counter() - began:.0f} s", flush=True)
        if keep:
            write(name, now)
        elif lines := changes(name, now, kept(name)):
            failures += 1
            print("\n".join(lines), flush=True)
    print("kept" if keep else f"{len(chosen)} steps compiled, {failures} changed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
