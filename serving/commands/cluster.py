"""python -m serving cluster MODEL: replicas of a server behind haproxy; roll and replicas: what is asked of them."""

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from inference.options import model
from runtime import locks
from runtime.arguments import Parser
from runtime.exit_codes import MISTAKE
from runtime.ports import free_port
from serving.access import guard, secrets
from serving.access.opening import FOLDER
from serving.batches.multipart import MOST_AROUND
from serving.batches.store import MOST_FILE_BYTES
from serving.body import MOST_BYTES
from serving.cluster import control
from serving.cluster.balancer import ROUTINGS, Balancer
from serving.cluster.replica import Replica, Watching, shares
from serving.cluster.supervisor import Supervisor
from serving.commands.serve import add_serve, seconds
from serving.lifecycle import bound
from serving.opening import count, name_of

PLACE = "cluster"  # of its sockets, in the state folder
LONGEST_SOCKET = 97  # bytes of a path that haproxy takes, which adds some; the system takes 107
MOST_REPLICAS = 64
# Options of the server that the balancer takes over; a replica listens at a socket in their place.
TAKEN_OVER = (
    *("model", "settings", "host", "port", "socket", "name", "state", "metrics_port"),
    *("insecure", "tls_cert", "tls_key", "tls_client_ca"),
)
TRY = ("/v1/models", None)  # a request that every model answers


def add_cluster(parser: Parser) -> None:
    """The server's options, and those of the balancer."""
    add_serve(parser)
    own = parser.add_argument_group("replicas and balancer")
    own.add_argument("--replicas", type=count, default=2, metavar="N", help="processes that serve (%(default)s)")
    own.add_argument("--routing", choices=ROUTINGS, default="least", help="fewest requests, or by the prompt's start")
    own.add_argument(
        "--connections", type=count, default=512, metavar="N", help="of clients at a time; more wait (%(default)s)"
    )
    own.add_argument(
        "--kept-body", type=count, default=256 << 10, metavar="BYTES",
        help="of the largest body that is kept, to be sent again where its replica dies (%(default)s)",
    )  # fmt: skip
    own.add_argument(
        "--silent", type=seconds, default=3.0, metavar="SECONDS",
        help="without an answer to a look, after which a replica is killed (%(default)g)",
    )  # fmt: skip
    parser.usage = "python -m serving cluster MODEL [--replicas N] [options] [key=value ...]"
    parser.set_defaults(command=run_cluster)


def add_roll(parser: Parser) -> None:
    """Whose replicas, and to which model."""
    _add_state(parser)
    parser.add_argument("model", metavar="MODEL", nargs="?", type=model, help="other weights (default: the same again)")
    parser.set_defaults(command=roll)


def add_replicas(parser: Parser) -> None:
    """Whose replicas."""
    _add_state(parser)
    parser.set_defaults(command=show)


def _add_state(parser: Parser) -> None:
    parser.add_argument("--state", type=Path, default=FOLDER, help=f"the folder of a cluster that runs ({FOLDER})")


def run_cluster(options: argparse.Namespace) -> int:
    """Runs replicas and balancer until SIGTERM. Raises ValueError or OSError for what the user can mend."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("isomesh").setLevel(logging.INFO)
    if options.socket:
        raise ValueError("a cluster has sockets of its own; --socket is for a single server")
    guard.tls(options)  # the files are right
    place = open_place(options.state, options.replicas)
    bound(options.host, options.port).close()  # a port that is taken is told before a model is read
    opened, _ = guard.open_safe(options)
    try:
        with locks.locked(place / "lock"):
            balancer = balancer_of(options, place)
            balancer.write()
            address = f"{balancer.scheme}://{balancer.address}:{balancer.port}"

            def ready() -> None:
                with contextlib.closing(opened.chain("commands")) as chain:
                    print(guard.first_key(options, opened, chain, address, TRY), flush=True)

            return asyncio.run(_run(Supervisor(balancer, replicas_of(options, balancer), ready), place))
    except locks.Locked:
        raise ValueError(f"a cluster runs on {place} already: stop it, or give another --state") from None
    finally:
        opened.store.close()


async def _run(supervisor: Supervisor, place: Path) -> int:
    async with control.answering(supervisor, place):
        return await supervisor.run()


def open_place(state: Path, replicas: int) -> Path:
    """The folder of the sockets, entered by its owner alone. Raises ValueError where its path is too long for them."""
    if replicas > MOST_REPLICAS:
        raise ValueError(f"--replicas {replicas} is more than {MOST_REPLICAS}")
    place = secrets.folder(secrets.folder(state).resolve() / PLACE)
    longest = len(os.fsencode(place / control.SOCKET))
    if longest > LONGEST_SOCKET:
        raise ValueError(
            f"{place / control.SOCKET} has {longest} bytes, a socket's path at most {LONGEST_SOCKET}: "
            f"give a --state that is {longest - LONGEST_SOCKET} bytes shorter"
        )
    return place


def balancer_of(options: argparse.Namespace, place: Path) -> Balancer:
    """The balancer that the options ask for."""
    sockets = tuple(place / f"r{number}.sock" for number in range(1, options.replicas + 1))
    address = {"host": options.host, "port": options.port or free_port()}
    own = {
        "routing": options.routing,
        "connections": options.connections,
        "body_bytes": MOST_BYTES,
        "upload_bytes": MOST_FILE_BYTES + MOST_AROUND,
        "kept_bytes": options.kept_body,
    }
    tls = {name: getattr(options, name) for name in ("tls_cert", "tls_key", "tls_client_ca")}
    return Balancer(place, sockets, **address, **own, **tls)


def replicas_of(options: argparse.Namespace, balancer: Balancer) -> list[Replica]:
    """The places of the replicas, each with its share of the GPUs."""
    watching = Watching(silent_seconds=options.silent, grace_seconds=options.grace)
    environments = shares(options.replicas, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [
        Replica(
            number, socket, command_of(options, number), str(options.model), watching, {**os.environ, **environment}
        )
        for number, (socket, environment) in enumerate(zip(balancer.sockets, environments, strict=True), 1)
    ]


def command_of(options: argparse.Namespace, number: int) -> Callable[[str, Path], Sequence[str]]:
    """How a replica is started. All bear one name, so that a client need not know which weights answer it.

    The first has its metrics at --metrics-port, each other one at the port behind.
    """
    serve = [sys.executable, "-m", "serving", "serve"]
    name = ["--name", options.name or name_of(options.model), "--state", str(options.state)]
    seen = ["--metrics-port", str(options.metrics_port + number - 1)] if options.metrics_port else []
    given = [*options.settings, *name, *words(options), *seen]
    return lambda model, socket: [*serve, model, *given, "--socket", str(socket)]


def words(options: argparse.Namespace) -> list[str]:
    """The server's options as they were given, those left out that the balancer takes over."""
    server, said = Parser(add_help=False), []
    add_serve(server)
    for action in server._actions:
        value = getattr(options, action.dest)
        if action.dest in TAKEN_OVER or value == action.default:
            continue
        values = value if isinstance(action, argparse._AppendAction) else [value]
        for each in values:
            said += action.option_strings[:1] + ([] if action.nargs == 0 else [str(each)])
    return said


def roll(options: argparse.Namespace) -> int:
    """Asks the cluster to replace its replicas, and says how it goes; the exit code."""
    if options.model is None:
        return _asked(options, command="roll")
    path = options.model  # from this folder, where it is one and not a name
    return _asked(options, command="roll", model=str(path.resolve() if path.exists() else path))


def show(options: argparse.Namespace) -> int:
    """Prints the replicas."""
    return _asked(options, command="show")


def _asked(options: argparse.Namespace, **asked) -> int:
    code = MISTAKE  # where it goes away without a last word
    for told in control.ask(options.state.expanduser().resolve() / PLACE, **asked):
        if "line" in told:
            print(told["line"], file=sys.stderr, flush=True)
        for replica in told.get("replicas", ()):
            print(
                f"{replica['number']:2}  {replica['state']:9}  pid {replica['pid']}  starts {replica['starts']}  ",
                end="",
            )
            print(replica["model"])
        code = told.get("code", code)
    return code
