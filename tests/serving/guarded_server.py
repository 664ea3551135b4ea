"""`python -m serving` as it is, but for its engine, which is the double: python guarded_server.py FOLDER [options]."""

import sys

from doubles import EngineDouble, chat_template

from runtime import leave
from serving import __main__ as serving
from serving.commands import serve
from serving.service import Service


def open_service(options) -> Service:
    """The double's; a model named `slow` takes its time for each token."""
    chat = chat_template()
    engine = EngineDouble(tokenizer=chat.tokenizer, reach=4096, seconds=0.05 if options.name == "slow" else 0.0)
    engine.start()
    return Service(engine, options.name or "double", "d0" * 32, chat)


if __name__ == "__main__":
    serve.open_service = open_service
    leave.answer_signals()
    sys.exit(serving.main(sys.argv[1:]))
