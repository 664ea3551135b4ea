"""Opens what guards a server from its state folder: secret, database, keys, roles and audit."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from serving.access import audit, policy, secrets
from serving.access.audit import Chain
from serving.access.keys import Keys
from serving.access.store import Store, open_store

FOLDER = Path("~/.isomesh/serving")  # where nothing else is said


@dataclass(frozen=True)
class Opened:
    """An open state folder."""

    folder: Path
    secret: bytes
    store: Store
    keys: Keys
    policy_file: policy.PolicyFile

    @cached_property
    def roles(self) -> policy.Policy:
        """Read when first asked for: a mistake in them hinders no key from being revoked. Raises ValueError."""
        return self.policy_file.read()

    def chain(self, name: str) -> Chain:
        """The audit of one process; those of one kind share a name."""
        return Chain(self.folder / audit.FOLDER, name, self.secret)


def open_state(folder: Path = FOLDER) -> Opened:
    """Opens a state folder, made where it is not there yet. Raises ValueError or OSError with what is wrong."""
    folder = secrets.folder(folder)
    secret = secrets.server_secret(folder)
    store = open_store(folder, secret)
    return Opened(folder, secret, store, Keys(store, secret), policy.PolicyFile(folder))


@contextlib.contextmanager
def recorded(opened: Opened, action: str, **told) -> Iterator[None]:
    """What a command does inside is in the audit before it is done. Raises OSError where it cannot be written."""
    chain = opened.chain("commands")
    try:
        who = {"who": f"local:{os.getuid()}", "role": "admin", "decision": "allow", "action": action}
        chain.write({**who, **told}, sync=True)
        yield
        with contextlib.suppress(Exception):
            opened.store.keep_head(*chain.head())
    finally:
        chain.close()
