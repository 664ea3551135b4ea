"""Progress bars for the commands of this room."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """How far each thing is, told as (what, bytes done, bytes in all): a bar on a terminal, elsewhere a line."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as shown:
        tasks = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
                if not console.is_terminal:
                    console.print(f"{what} ...")
            shown.update(tasks[what], completed=done, total=total)

        yield progress


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """How many bytes of `total` are done."""
    with bars() as progress:
        progress(what, 0, total)
        yield lambda done: progress(what, done, total)
