"""Keys over HTTP, for who has the permission "keys": GET, POST and DELETE /v1/keys. The text of a key is told once."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from serving.access.door import Door, Known
from serving.access.gate import Caller, needs
from serving.access.keys import Key
from serving.access.limits import LIMITS
from serving.api.routes import READS, ends
from serving.body import Body, body_of
from serving.errors import ApiError

router = APIRouter()
Count = Annotated[int, Field(ge=0, lt=2**53)]


class NewKey(Body):
    """What a new key is to be."""

    role: Annotated[str, Field(max_length=64)]
    name: Annotated[str, Field(max_length=64)] = ""
    tenant: Annotated[str, Field(max_length=64)] | None = None
    models: Annotated[list[Annotated[str, Field(max_length=256)]], Field(min_length=1, max_length=64)] = Field(
        default_factory=lambda: ["*"]
    )
    limits: Annotated[dict[str, Count], Field(max_length=len(LIMITS))] = Field(default_factory=dict)
    expires_in: Annotated[float, Field(gt=0, le=1e10)] | None = None  # seconds


class OneKey(BaseModel):
    """A key, without its secret."""

    id: str
    name: str
    role: str
    tenant: str
    models: list[str]
    limits: dict[str, int]
    made: float
    made_by: str
    expires: float | None
    revoked: float | None


class MadeKey(OneKey):
    """A key just made, with its text, which is shown this once."""

    key: str


class AllKeys(BaseModel):
    """Every key."""

    data: list[OneKey]


def _shown(key: Key, kind: type[OneKey] = OneKey, /, **more) -> OneKey:
    same = {name: getattr(key, name) for name in OneKey.model_fields}
    return kind(**{**same, "models": list(key.models), "limits": dict(key.limits)}, **more)


def _answer(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json", headers={"Cache-Control": "no-store"})


@router.get("/v1/keys", response_model=AllKeys, responses=ends(*READS))
async def keys(request: Request, caller: Caller = Depends(needs("keys"))):  # noqa: B008
    """Every key, oldest first."""
    door: Door = request.app.state.gate
    return _answer(AllKeys(data=[_shown(key) for key in await door.ask(door.keys.all)]))


@router.post("/v1/keys", response_model=MadeKey, responses=ends(*READS, 408, 413, 415))
async def create(request: Request, caller: Caller = Depends(needs("keys")), body: NewKey = Depends(body_of(NewKey))):  # noqa: B008
    """Makes a key of a role that may do no more than the caller's own. Another's tenant is for admins to name."""
    door: Door = request.app.state.gate
    identity = caller.identity
    if body.role not in door.roles.roles:
        raise ApiError(400, f"no role {body.role!r}: {', '.join(door.roles.roles)}", param="role")
    if not door.roles.covers(identity.role, body.role) or identity.models != ("*",):
        raise ApiError(403, f"{body.role!r} may do more than you", param="role", code="permission_denied")
    _check_reach(identity, body)
    given = {"name": body.name, "tenant": body.tenant, "models": tuple(body.models), "limits": body.limits}
    try:
        door.roles.limits(body.role).changed(body.limits)
        make = lambda: door.keys.create(body.role, made_by=identity.name, seconds=body.expires_in, **given)
        key, text = await door.ask(make)
    except ValueError as error:
        raise ApiError(400, f"{error}", code="invalid_value") from None
    await door.add(identity, "keys create", request, subject=key.id, for_role=key.role)
    return _answer(_shown(key, MadeKey, key=text))


def _check_reach(identity: Known, body: NewKey) -> None:
    """Raises ApiError 403 for a key that reads what another tenant keeps, or leaves the limits of the caller's own."""
    if identity.role == "admin":
        return
    if body.tenant not in (None, identity.tenant):
        told = f"tenant={body.tenant!r} is not yours, {identity.tenant!r}; without one the key gets a tenant of its own"
        raise ApiError(403, told, param="tenant", code="permission_denied")
    if identity.limits:
        told = f"your key has limits of its own, {', '.join(identity.limits)}: only admins may make others then"
        raise ApiError(403, told, code="permission_denied")


@router.delete("/v1/keys/{id}", response_model=OneKey, responses=ends(*READS, 404))
async def revoke(request: Request, id: str, caller: Caller = Depends(needs("keys"))):  # noqa: B008
    """Revokes a key at once, in every replica."""
    door: Door = request.app.state.gate
    try:
        key = await door.ask(lambda: door.keys.get(id))
    except ValueError:
        raise ApiError(404, "there is no such key", param="id", code="key_not_found") from None
    if not door.roles.covers(caller.identity.role, key.role):
        raise ApiError(403, f"{key.role!r} may do more than you", code="permission_denied")
    key = await door.ask(lambda: door.keys.revoke(id))
    await door.add(caller.identity, "keys revoke", request, subject=key.id)
    return _answer(_shown(key))
