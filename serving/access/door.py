"""The gate of a server: keys and tokens, roles, limits and the audit together, asked by every request.

The event loop never waits here: the database and the audit are used in threads, but for what SQLite does at once, where
no other writer is in its way.
Nothing is remembered from one request to the next, so that a key revoked anywhere is refused from that moment.

Where something fails:
1. The database cannot be reached: a request waits up to PATIENCE seconds for it, then 503. Nobody is let in unseen.
2. The audit cannot be written (a full disk): an admin's action is refused, 503. Other requests are served, and their
   records kept in memory until there is room; with `strict` they are refused, too.
3. `policy.csv` changes and says nothing that can be followed: the roles stay as they were, and the log says so.
4. This process is killed: after LEASE_SECONDS its requests no longer count as running. What they had taken of the
   tokens stays taken, since nobody knows what they used.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request
from limits import parse, storage, strategies

from serving.access import credentials, policy, store, tokens
from serving.access.audit import Chain
from serving.access.gate import Identity
from serving.access.keys import Keys
from serving.access.limits import BEAT_SECONDS, Limits, Quotas, Refused, Taken
from serving.access.opening import Opened
from serving.errors import ApiError

log = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds that a request waits for a database that is away
THREADS = 8
COUNTED = ("chat", "completions", "embeddings", "classify")  # recorded when they end, with what they used
BRIEF = ("tokens",)  # no admission of their own, but work all the same: each counts as a request
UNSEEN = ("page", "state", "metrics", "models", "schema")  # recorded only where refused: they come every second
REFUSALS = parse("20/second")  # of strangers that are recorded one by one
TOO_LONG = "context_length_exceeded"

T = TypeVar("T")


@dataclass(frozen=True)
class Known(Identity):
    """Who a request comes from, with what their limits count by."""

    holder: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)  # their own; others are the role's


class Door:
    """Implements serving.access.gate.Gate. `start` before the first request, `close` after the last; in any thread."""

    def __init__(
        self,
        opened: store.Store,
        keys: Keys,
        roles: policy.Policy,
        policy_file: policy.PolicyFile,
        chain: Chain,
        provider: tokens.Provider | None = None,
        *,
        strict: bool = False,
        texts: bool = False,
        patience: float = PATIENCE,
    ):
        self.store, self.keys, self.roles, self.chain = opened, keys, roles, chain
        self._policy_file = policy_file
        self.texts = texts  # whether request.state.audited_text, where an endpoint leaves it, is recorded
        self._tokens = tokens.Tokens(provider) if provider else None
        self._strict, self._patience = strict, patience
        self.replica = f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}"
        self.quotas = Quotas(opened, self.replica)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="access")
        self._unsettled: deque[tuple[Taken, int, bool]] = deque()
        self._ending = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="access beat", daemon=True)
        self._strangers = strategies.FixedWindowRateLimiter(storage.MemoryStorage())
        self._unrecorded = 0

    def start(self) -> None:
        """Says to the other replicas that this one lives, and goes on to. Raises Unreachable."""
        self.quotas.beat()
        self._beating.start()

    def close(self) -> None:
        """Gives back what this replica holds, and writes down what is left to be written."""
        self._ending.set()
        self._beating.join()
        self._threads.shutdown()
        for work in (self._settle_rest, self.quotas.leave, self._copy_head):
            with contextlib.suppress(store.Unreachable):
                work()
        self.chain.close()
        self.store.close()

    # ---- who -------------------------------------------------------------------------------------------------

    async def identify(self, request: Request) -> Identity:
        """Raises ApiError: 401 for a key or token that is missing, wrong, expired or revoked."""
        text = ""
        try:
            text = credentials.shown(request)
            found = await (self._by_key(text) if text.startswith("im-") else self._by_token(text))
        except ApiError as error:
            await self._record_stranger(request, error.message)
            raise
        except tokens.Wrong as wrong:
            found, reason = None, f"token: {wrong}"
        except tokens.Unreachable:
            raise ApiError(503, "the keys of tokens cannot be reached", retry_after=5) from None
        else:
            reason = "key: wrong, expired or revoked"
        if found is None:
            await self._record_stranger(request, reason)
            raise credentials.unauthorized(request, "the key or token is wrong, expired or revoked")
        return found

    async def _by_key(self, text: str) -> Known | None:
        key = await self._look_up(lambda: self.keys.find(text))
        return key and Known(key.id, key.role, key.tenant, key.models, key.holder, key.limits)

    async def _by_token(self, text: str) -> Known | None:
        if self._tokens is None:
            raise tokens.Wrong("no provider of tokens is set")
        claims = await self._run(lambda: self._tokens.claims(text))
        subject = claims["sub"]
        since = await self._look_up(lambda: self.keys.barred_since(subject))
        if since is not None and claims["iat"] <= since:
            raise tokens.Wrong("revoked")
        # a subject cannot be taken for a key, nor can its tenant: both bear a mark that no key has
        name = f"jwt:{subject}"
        return Known(name, claims.get("role", ""), f"jwt:{claims.get('tenant', subject)}", holder=name)

    def keep(self, identity: Known) -> dict:
        """Nothing that lets anybody in: of a key its holder, of a token whose it was."""
        fields = {name: getattr(identity, name) for name in ("name", "role", "tenant", "holder")}
        return {**fields, "models": list(identity.models), "limits": dict(identity.limits), "since": time.time()}

    async def again(self, kept: Mapping) -> Known:
        """A key's holder has the role, models and limits of the newest key; a token's those that it had."""
        if not kept["holder"].startswith("jwt:"):
            key = await self._look_up(lambda: self.keys.usable_of(kept["holder"]))
            if key is None:
                raise ApiError(401, "the key was revoked, or has expired", code="invalid_api_key")
            return Known(key.id, key.role, key.tenant, key.models, key.holder, key.limits)
        since = await self._look_up(lambda: self.keys.barred_since(kept["holder"].removeprefix("jwt:")))
        if since is not None and kept["since"] <= since:
            raise ApiError(401, "the token was revoked", code="invalid_api_key")
        models, limits = tuple(kept["models"]), kept["limits"]
        return Known(kept["name"], kept["role"], kept["tenant"], models, kept["holder"], limits)

    # ---- may they --------------------------------------------------------------------------------------------

    async def allow(self, identity: Identity, permission: str, request: Request) -> None:
        """Raises ApiError: 403 where the role may not, 503 for an admin's action that cannot be written down."""
        if not self.roles.may(identity.role, permission):
            await self._record(identity, permission, request, decision="deny", status=403)
            raise ApiError(403, f"role {identity.role!r} may not use {permission!r}", code="permission_denied")
        if permission in policy.ADMIN or self._strict:
            await self._record_first(identity, permission, request)
        elif permission in BRIEF:
            room = await self.admit(identity, request, permission=permission, model=None, prompt_tokens=0, new_tokens=0)
            await room.settle(200)
        elif permission not in (*COUNTED, *UNSEEN):
            await self._record(identity, permission, request, decision="allow")

    async def admit(
        self, identity: Identity, request: Request, *,
        permission: str, model: str | None, prompt_tokens: int, new_tokens: int,
    ) -> "Room":  # fmt: skip
        """As serving.access.gate.Gate. Raises ApiError 403, 400 or 429."""
        record = {"model": model, "prompt_tokens": prompt_tokens}
        try:
            if model is not None:
                self._check_model(identity, permission, model)
            own = self._own_limits(identity)
            total = self.roles.total(identity.role)
            _check_size(own, "this key", prompt_tokens, new_tokens)
            _check_size(total, f"all with role {identity.role!r} together", prompt_tokens, new_tokens)
            subjects = {f"holder:{identity.holder}": own, f"role:{identity.role}": total}
            id = secrets.token_hex(12)
            taken = Taken(id)
            if any(limit.counted for limit in subjects.values()):
                taken = await self._take(id, subjects, prompt_tokens + new_tokens)
            if isinstance(taken, Refused):
                raise _too_many(taken)
        except ApiError as error:
            await self._record(identity, permission, request, decision="deny", status=error.status, **record)
            raise
        return Room(self, identity, request, permission, model, taken)

    async def _take(self, id: str, subjects: Mapping[str, Limits], wanted: int) -> Taken | Refused:
        """Takes room; where the client goes away meanwhile, it is given back."""
        if (taken := self._at_once(lambda: self.quotas.take(id, subjects, wanted, wait=False))) is not None:
            return taken
        taking = asyncio.ensure_future(self._reach(lambda: self.quotas.take(id, subjects, wanted)))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(self._abandon)
            raise

    def _abandon(self, taking: asyncio.Future) -> None:
        if not taking.cancelled() and taking.exception() is None and isinstance(taking.result(), Taken):
            self._unsettled.append((taking.result(), 0, False))

    def _check_model(self, identity: Identity, permission: str, model: str) -> None:
        if not (policy.allows(identity.models, model) and self.roles.may(identity.role, permission, model)):
            raise ApiError(403, f"no access to model {model[:100]!r}", param="model", code="permission_denied")

    def _own_limits(self, identity: Identity) -> Limits:
        return self.roles.limits(identity.role).changed(identity.limits)

    async def settle(self, room: "Room", status: int, prompt_tokens: int, new_tokens: int) -> None:
        """Gives back and writes down; whatever fails, neither raises."""
        text = getattr(room.request.state, "audited_text", None) if self.texts else None
        counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "status": status, "text": text}
        told = _told(room.identity, room.permission, room.request, decision="allow", model=room.model, **counts)
        ran = status < 500 or new_tokens > 0  # else the server had no room for it, or failed: it costs nothing
        used = prompt_tokens + new_tokens if ran else 0
        held = room.taken.leased and not self._at_once(
            lambda: self.quotas.settle(room.taken, used, ran=ran, wait=False)
        )
        await asyncio.shield(self._run(lambda: self._settle(room.taken, used, ran, told, held)))

    def _settle(self, taken: Taken, used: int, ran: bool, told: Mapping, held: bool) -> None:
        self.chain.note(told)
        try:
            if held:
                self.quotas.settle(taken, used, ran=ran)
        except store.Unreachable:
            self._unsettled.append((taken, used, ran))

    # ---- the audit -------------------------------------------------------------------------------------------

    async def _record(self, identity: Identity, permission: str, request: Request, **told) -> None:
        await self._run(lambda: self.chain.note(_told(identity, permission, request, **told)))

    async def _record_first(self, identity: Identity, permission: str, request: Request) -> None:
        told = _told(identity, permission, request, decision="allow")
        try:
            await self._run(lambda: self.chain.write(told, sync=permission in policy.ADMIN))
        except OSError:
            raise ApiError(503, "refused: the audit cannot be written", code="audit", retry_after=30) from None

    async def _record_stranger(self, request: Request, reason: str) -> None:
        """One by one up to a rate, then counted: strangers shall not fill the disk."""
        if not self._strangers.hit(REFUSALS):
            self._unrecorded += 1
            return
        more = {"unrecorded": self._unrecorded} if self._unrecorded else {}
        self._unrecorded = 0
        nobody = Identity("-", "-", "-")
        await self._record(nobody, "identify", request, decision="deny", status=401, reason=reason, **more)

    async def ask(self, work: Callable[[], T]) -> T:
        """Runs what needs the database in a thread, as for every request. Raises ApiError (503)."""
        return await self._reach(work)

    async def add(self, identity: Identity, action: str, request: Request, **told) -> None:
        """Notes what came of an admin's action, whose permission is in the audit already."""
        await self._record(identity, action, request, decision="allow", **told)

    # ---- threads and the database ----------------------------------------------------------------------------

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _at_once(self, work: Callable[[], T]) -> T | None:
        """The result of what waits for nobody, which SQLite does here; None: it is to be done in a thread.

        It takes 50 to 150 microseconds; to hand it to a thread and back would take as long again.
        """
        if self.store.postgres:
            return None
        with contextlib.suppress(store.Unreachable):
            return work()

    async def _look_up(self, work: Callable[[], T]) -> T:
        """Runs one read by a key, which waits for no writer."""
        if not self.store.postgres:
            with contextlib.suppress(store.Unreachable):
                return work()
        return await self._reach(work)

    async def _reach(self, work: Callable[[], T]) -> T:
        """Runs what needs the database, again and again while it is away. Raises ApiError (503) when it stays so."""
        ends, pause = time.monotonic() + self._patience, 0.05
        while True:
            try:
                return await self._run(work)
            except store.Unreachable as error:
                if time.monotonic() + pause > ends:
                    log.error("the database of keys cannot be used: %s", error)
                    raise ApiError(503, "the keys cannot be looked up now", retry_after=5) from None
            await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause)

    def _beat(self) -> None:
        """Each second, in a thread of its own: records to the disk, new roles; each few seconds that we live."""
        beats = 0
        while not self._ending.wait(1.0):
            beats += 1
            with contextlib.suppress(OSError):
                self.chain.flush()
            self.renew_roles()
            if beats % BEAT_SECONDS and not self._unsettled:
                continue
            try:
                for work in (self.quotas.beat, self._settle_rest, self._copy_head, self.store.tidy):
                    work()
            except store.Unreachable as error:
                log.warning("the database of keys cannot be used: %s", error)

    def renew_roles(self) -> None:
        """Roles and limits of a file that has changed hold from now on, if they can be read and written down."""
        if not self._policy_file.settled():
            return
        told = {"who": "server", "role": "admin", "action": "policy reload", "decision": "allow"}
        try:
            roles = self._policy_file.read()
            self.chain.write(told, sync=True)
        except OSError as error:
            log.error("the roles stay as they were until the file and the audit can be used: %s", error)
            self._policy_file.forget()
        except Exception as error:  # whatever is in the file, this thread goes on
            log.error("the roles stay as they were: %s", error)
            self.chain.note({**told, "decision": "deny", "reason": str(error)})
        else:
            self.roles = roles
            log.info("new roles and limits: %s", ", ".join(roles.roles))

    def _settle_rest(self) -> None:
        while self._unsettled:
            taken, used, ran = self._unsettled[0]
            self.quotas.settle(taken, used, ran=ran)
            self._unsettled.popleft()

    def _copy_head(self) -> None:
        name, sequence, digest = self.chain.head()
        if sequence:
            self.store.keep_head(name, sequence, digest)


def open_door(opened: Opened, provider: tokens.Provider | None = None, **how) -> Door:
    """The gate of one server process, from its open state folder; `how` as Door has it."""
    return Door(opened.store, opened.keys, opened.roles, opened.policy_file, opened.chain("server"), provider, **how)


@dataclass
class Room:
    """Implements serving.access.gate.Admission."""

    door: Door
    identity: Identity
    request: Request
    permission: str
    model: str | None
    taken: Taken
    settled: bool = False

    async def settle(self, status: int, prompt_tokens: int = 0, new_tokens: int = 0) -> None:
        """Gives back what was not used; the second call does nothing."""
        if not self.settled:
            self.settled = True
            await self.door.settle(self, status, prompt_tokens, new_tokens)


def _check_size(limits: Limits, who: str, prompt_tokens: int, new_tokens: int) -> None:
    asked = prompt_tokens + new_tokens
    for most, what in ((limits.context, "in one request"), (limits.most_tokens, "in its window")):
        if most is not None and asked > most:
            summed = f"{prompt_tokens} tokens of prompt + {new_tokens} new ones = {asked}"
            raise ApiError(400, f"{summed}, but {who} may use {most} {what}", code=TOO_LONG)


def _too_many(refused: Refused) -> ApiError:
    words = refused.limit.replace("_a_", " a ").replace("concurrent", "requests at once")
    return ApiError(
        429, f"beyond the limit of {refused.most} {words}", code="rate_limit_exceeded", retry_after=refused.retry_after
    )


def _told(identity: Identity, action: str, request: Request, **told) -> dict:
    """A record: who did what from where. Nothing secret, and no text unless it is given."""
    who = {"who": identity.name, "role": identity.role, "tenant": identity.tenant, "action": action}
    where = {"method": request.method, "path": request.url.path}
    where["address"] = request.client.host if request.client else None
    where["request"] = getattr(getattr(request.state, "record", None), "id", None)
    return {name: value for name, value in {**who, **told, **where}.items() if value is not None}
