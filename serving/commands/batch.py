"""`python -m serving batch IN.jsonl OUT.jsonl MODEL`: a file of requests, answered in this process."""

import argparse
import sys
from pathlib import Path

from runtime.arguments import Parser
from runtime.exit_codes import DONE, FAULT
from serving.opening import add_model, open_service


def add_batch(parser: Parser) -> None:
    """The options of a batch."""
    parser.usage = "python -m serving batch IN.jsonl OUT.jsonl MODEL [options] [key=value ...]"
    line = '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}'
    parser.epilog = (
        f"A line of IN: {line}. Lines of OUT come as they are finished; their field `line` is the number in IN. After "
        "an end of any kind the same command goes on where OUT ends."
    )
    parser.add_argument("source", metavar="IN.jsonl", type=Path, help="requests, one a line, as for the OpenAI API")
    parser.add_argument("output", metavar="OUT.jsonl", type=Path, help="their answers; what is there is not done again")
    add_model(parser)
    parser.set_defaults(command=batch)


def batch(options: argparse.Namespace) -> int:
    """Answers what is not answered yet. Raises ValueError or OSError for what the user can mend."""
    import asyncio

    from serving.app import create_app
    from serving.batch import Output, Owner, run

    with open(options.source, "rb"), Output(options.output) as output:  # told before a model is read
        before = len(output.done)
        service = open_service(options)
        try:
            width = 2 * (options.max_running or service.engine.options.max_running)  # the next are ready when some end
            tell = lambda added: print(f"\r{before + added} lines", end="", file=sys.stderr, flush=True)
            told = tell if sys.stderr.isatty() else lambda added: None
            app, works = create_app(service, Owner()), lambda: not service.engine.state().draining
            added = asyncio.run(run(app, options.source, output, width, told, goes_on=works))
            worked = works()
        finally:
            service.engine.stop(0.0)
    end = "\r" if sys.stderr.isatty() else ""
    print(f"{end}{options.output}: {added} lines added to {before}", file=sys.stderr)
    if not worked:
        print("error: the engine has failed; the same command goes on with the lines that are left", file=sys.stderr)
    return DONE if worked else FAULT
