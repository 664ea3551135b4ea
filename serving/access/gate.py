"""Who may do what: the one gate that every route but the public ones goes through.

A route names a permission with `needs`; a route that names none is refused when the application is put together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fastapi import Request

from serving.access.permissions import PERMISSIONS, PUBLIC

__all__ = ["PERMISSIONS", "PUBLIC", "Admission", "Caller", "Gate", "Identity", "needs"]


@dataclass(frozen=True)
class Identity:
    """Who a request comes from."""

    name: str  # as the audit names them: the prefix of a key, or the subject of a token
    role: str
    tenant: str  # requests and files belong to it
    models: tuple[str, ...] = ("*",)


class Admission(Protocol):
    """Room in somebody's limits, taken for one request before it runs."""

    async def settle(self, status: int, prompt_tokens: int = 0, new_tokens: int = 0) -> None:
        """Gives back what was not used, and writes the audit; once, however the request ended."""


class Gate(Protocol):
    """Tells who a request comes from, and what they may do. Each method raises ApiError."""

    async def identify(self, request: Request) -> Identity:
        """401 where the credentials are missing, wrong, expired or revoked."""

    def keep(self, identity: Identity) -> dict:
        """What `again` wants to know of somebody later, as JSON has it; nothing secret."""

    async def again(self, kept: Mapping) -> Identity:
        """Somebody as they are now. 401 where all that they could show was revoked meanwhile, or has expired."""

    async def allow(self, identity: Identity, permission: str, request: Request) -> None:
        """403 where the role may not."""

    async def admit(
        self, identity: Identity, request: Request, *,
        permission: str, model: str | None, prompt_tokens: int, new_tokens: int,
    ) -> Admission:  # fmt: skip
        """403 for a model that the role may not use, 400 for more tokens than it may ask for, 429 beyond its limits.

        model: None for work that asks none.
        """

    async def add(self, identity: Identity, action: str, request: Request, **told) -> None:
        """Notes what came of an admin's action, whose permission is in the audit already."""


@dataclass
class Caller:
    """A request's sender, let in: what an endpoint gets from `needs`."""

    identity: Identity
    permission: str
    request: Request = field(repr=False)
    gate: Gate = field(repr=False)

    async def admit(self, model: str, prompt_tokens: int, new_tokens: int) -> Admission:
        """Takes room for a request of so many tokens, new ones for all choices together. Raises as Gate.admit."""
        sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        return await self.gate.admit(self.identity, self.request, permission=self.permission, model=model, **sizes)


def needs(permission: str) -> Callable:
    """A FastAPI dependency that lets in who has this permission and gives the endpoint its Caller."""
    assert permission in PERMISSIONS, permission

    async def caller(request: Request) -> Caller:
        gate: Gate = request.app.state.gate
        identity = await gate.identify(request)
        await gate.allow(identity, permission, request)
        request.state.caller = Caller(identity, permission, request, gate)
        return request.state.caller

    caller.permission = permission
    return caller
