"""Ports for programs that listen on the loopback interface a moment later."""

import contextlib
import random
import socket
from pathlib import Path

LOWEST = 10_000
# Linux gives outgoing connections a port from here on; one of these may be taken before its finder listens.
OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
TRIES = 1_000


def free_port(count: int = 1) -> int:
    """The first of `count` TCP ports in a row that were free a moment ago. Raises OSError where none is found."""
    try:
        highest = int(OUTGOING.read_text().split()[0])
    except (OSError, ValueError):
        highest = 32_768
    if highest - LOWEST < 2 * count:  # the system was told to give out nearly all
        highest = 65_536
    for _ in range(TRIES):
        first = random.SystemRandom().randrange(LOWEST, highest - count + 1)
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError(f"no {count} free ports in a row between {LOWEST} and {highest}")
