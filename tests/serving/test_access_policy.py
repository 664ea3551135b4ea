"""Roles: what no line allows is refused, on every route that there is."""

import csv
from pathlib import Path

import pytest
from doubles import EngineDouble

from serving import __main__ as serving
from serving.access import routes
from serving.access.gate import PERMISSIONS, PUBLIC
from serving.access.limits import Limits
from serving.access.policy import ROLES, Policy, allows
from serving.app import create_app, permission_of
from serving.service import Service

ROOT = Path(__file__).parents[2]


def policy(text: str) -> Policy:
    return Policy(csv.reader(text.splitlines(), skipinitialspace=True))


OWN = """
# those who look into texts
p, analyst, embeddings, small*
p, analyst, chat, small-chat
g, analyst, reader
limit, analyst, requests_a_minute, 60
limit, user, context, 4096
total, analyst, tokens_a_day, 1000000
"""


def test_every_route_names_a_permission(tmp_path):
    """All routes of the application are walked; only two of them are for everybody."""
    app = create_app(Service(EngineDouble(), "double", "d0"), None, [routes.router])
    named = {route.path: permission_of(route) for route in app.routes}
    assert {path for path, permission in named.items() if permission == PUBLIC} == {"/livez", "/readyz"}
    assert all(permission in {*PERMISSIONS, PUBLIC} for permission in named.values()), named


def test_a_route_without_a_permission_is_refused():
    forgetful = type(routes.router)()
    forgetful.get("/secrets")(lambda: "all of them")
    with pytest.raises(ValueError, match="/secrets does not say who may use it"):
        create_app(Service(EngineDouble(), "double", "d0"), None, [forgetful])


def test_the_documents_matrix_is_the_one_in_force(tmp_path, capsys):
    assert serving.main(["keys", "roles", "--state", str(tmp_path)]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "access.md").read_text()


def test_the_four_roles():
    roles = Policy()
    assert roles.roles == ["admin", "operator", "user", "reader"]
    for role, permissions in ROLES.items():
        for permission in PERMISSIONS:
            assert roles.may(role, permission, "any") == (permission in permissions or role == "admin"), (
                role,
                permission,
            )
    for nobody in ("", "root", "Admin", "*", "admin "):
        assert not any(roles.may(nobody, permission, "m") for permission in PERMISSIONS)


def test_an_operators_own_role():
    roles = policy(OWN)
    assert roles.may("analyst", "embeddings", "small-2")
    assert roles.may("analyst", "embeddings")
    assert not roles.may("analyst", "embeddings", "large")
    assert not roles.may("analyst", "embeddings", "")
    assert roles.may("analyst", "chat", "small-chat")
    assert not roles.may("analyst", "chat", "small-2")
    assert roles.may("analyst", "metrics")
    assert not roles.may("analyst", "completions", "small-chat")
    assert not roles.may("reader", "embeddings", "small-2")
    assert roles.limits("analyst") == Limits(requests_a_minute=60)
    assert roles.total("analyst") == Limits(tokens_a_day=1_000_000)
    assert roles.limits("user") == Limits(context=4096)
    assert roles.limits("admin") == Limits()
    matrix = {permission: who for permission, _, who in roles.matrix()}
    assert matrix["embeddings"] == ["admin", "user", "analyst"]
    assert set(matrix) == set(PERMISSIONS)


def test_nobody_gives_away_more_than_they_have():
    roles = policy(
        "p, chief, keys, *\np, chief, chat, *\np, pupil, chat, small*\np, poor, *, *\nlimit, poor, concurrent, 1"
    )
    assert roles.covers("admin", "admin")
    assert roles.covers("chief", "pupil")
    assert roles.covers("chief", "chief")
    assert not roles.covers("chief", "admin")
    assert not roles.covers("chief", "user")
    assert not roles.covers("pupil", "chief")
    assert not roles.covers("poor", "pupil")  # whose limits are wider


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("p, analyst, fly, *", "policy.csv:2: no permission 'fly': \\*, chat, completions"),
        ("p, analyst, chat", "policy.csv:2: 'p, analyst, chat' is no line"),
        ("q, analyst, chat, *", "policy.csv:2: 'q, analyst"),
        ("g, analyst, king", "policy.csv: no role 'king': admin, operator, user, reader, analyst"),
        ("limit, analyst, speed, 3", "policy.csv:2: no limit 'speed': requests_a_minute"),
        ("limit, user, concurrent, many", "policy.csv:2: 'many' must be a whole number"),
        ("limit, user, concurrent, -1", "policy.csv:2: '-1' must be a whole number"),
        ("limit, king, concurrent, 1", "no role 'king'"),
        ("total, user, context, 1", "policy.csv:2: context is a limit of one request"),
        ("limit, admin, concurrent, 1", "policy.csv:2: admin may do everything"),
        ("p, a b, chat, *", "policy.csv:2: role 'a b' is no name"),
        ("p, analyst, __import__('os'), *", "no permission"),
    ],
)
def test_lines_that_say_nothing(line, told):
    with pytest.raises(ValueError, match=told):
        policy(f"# mine\n{line}")


def test_models_are_named_as_files_are():
    assert allows(("small*", "x"), "small-2")
    assert not allows(("small*",), "Small-2")
    assert not allows((), "small")
    assert not allows(("(a+)+$",), "aaaa")


def test_a_mistake_in_the_roles_hinders_no_key_from_being_revoked(tmp_path, capsys):
    state = ["--state", str(tmp_path)]
    assert serving.main(["keys", "create", "--role", "user", *state]) == 0
    id = capsys.readouterr().out.rpartition("-")[0]
    (tmp_path / "policy.csv").write_text("p, analyst, fly, *")
    assert serving.main(["keys", "revoke", id, *state]) == 0
    assert serving.main(["audit", "verify", *state]) == 0
    assert serving.main(["keys", "create", "--role", "user", *state]) == 2
    assert "no permission 'fly'" in capsys.readouterr().err
