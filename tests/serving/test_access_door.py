"""The gate before a server: who comes in, what they may do, how much, and what is written down of it."""

import json
import threading
import time

import pytest
from doubles import saying
from guarded import guarded
from sqlalchemy import func, select

from serving.access import audit, store, verify
from serving.access.gate import PERMISSIONS, PUBLIC
from serving.app import permission_of

POLICY = """
p, small, completions, small*
p, small, models, *
p, two, completions, *
total, two, requests_a_minute, 2
p, few, completions, *
total, few, tokens_a_minute, 100
p, helper, keys, *
p, helper, completions, *
limit, user, context, 200
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with guarded(tmp_path_factory.mktemp("state"), policy=POLICY, patience=0.3) as server:
        yield server


@pytest.fixture(scope="module")
def keys(server):
    return {role: server.key(role) for role in server.door.roles.roles}


def last(server) -> dict:
    return max(server.records(), key=lambda record: record["time"])


def test_a_changed_policy_holds_and_a_broken_one_does_not(tmp_path):
    with guarded(tmp_path, policy="p, two, completions, *") as server:
        file, key = tmp_path / "policy.csv", server.key("two")
        assert server.complete(key).status == 200

        def changed(text: str) -> None:
            file.write_text(text)
            server.door.renew_roles()  # sees that it is another one
            server.door.renew_roles()  # and that nobody is writing it any more

        changed("p, two, models, *")
        assert server.complete(key).status == 403
        assert server.ask(key, "GET", "/v1/models").status == 200
        told = [record for record in server.records() if record["action"] == "policy reload"]
        assert [record["decision"] for record in told] == ["allow"]
        for broken in ("p, two, fly, *", "\x00", "p, two", "x" * 200_000):
            changed(broken)
            assert server.complete(key).status == 403
            assert server.ask(key, "GET", "/v1/models").status == 200
        assert any(record.get("reason", "").endswith("schema") for record in server.records())
        file.unlink()
        server.door.renew_roles()
        server.door.renew_roles()
        assert server.ask(key, "GET", "/v1/models").status == 403  # there is no such role


def test_a_new_policy_that_cannot_be_written_down_does_not_hold_yet(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with guarded(tmp_path, policy="p, two, completions, *") as server:
        key = server.key("two")
        monkeypatch.setattr(server.door.chain, "write", full)
        (tmp_path / "policy.csv").write_text("p, two, models, *")
        for _ in range(3):
            server.door.renew_roles()
        assert server.complete(key).status == 200
        monkeypatch.undo()
        server.door.renew_roles()
        assert server.complete(key).status == 403


def routes(app):
    for route in app.routes:
        for method in route.methods:
            yield method, route.path.replace("{id}", "x").replace("{model:path}", "double"), permission_of(route)


def test_every_route_asks_who_it_is(server):
    for method, path, permission in routes(server.app):
        for key in (None, "im-wrong00000-" + "a" * 40):
            answer = server.ask(key, method, path)
            assert answer.status == 200 if permission == PUBLIC else 401, (method, path, answer)
            if permission != PUBLIC:
                assert answer.json["error"]["type"] == "authentication_error"
                scheme = "Basic" if path.startswith("/page/") else "Bearer"  # browsers ask for a password
                assert answer.headers["www-authenticate"].startswith(f'{scheme} realm="isomesh')


def test_every_route_is_closed_to_roles_without_its_permission(server, keys):
    """Role x route, as it is printed, is what a request meets: 403 exactly where there is no x."""
    for method, path, permission in routes(server.app):
        for role, key in keys.items():
            if permission in (PUBLIC, "drain") and role in ("admin", "operator"):
                continue  # there is no way back from a drain
            allowed = permission == PUBLIC or server.door.roles.may(role, permission)
            assert (server.ask(key, method, path).status != 403) == allowed, (role, method, path)
    assert {permission for *_, permission in routes(server.app)} <= {*PERMISSIONS, PUBLIC}


def test_a_request_is_written_down(server, keys):
    answer = server.complete(keys["user"], "the mesh is secret", 3)
    assert answer.status == 200
    record = last(server)
    used = answer.json["usage"]
    assert {name: record[name] for name in ("role", "action", "decision", "model", "status", "address", "path")} == {
        **{"role": "user", "action": "completions", "decision": "allow", "model": "double", "status": 200},
        **{"address": "127.0.0.1", "path": "/v1/completions"},
    }
    assert record["who"] == keys["user"][:13]
    assert (record["prompt_tokens"], record["new_tokens"]) == (used["prompt_tokens"], used["completion_tokens"])
    assert record["request"] == answer.headers["x-request-id"]
    assert "secret" not in json.dumps(record)


def test_refusals_are_written_down(tmp_path):
    with guarded(tmp_path / "refusals") as server:  # one that nobody else asks: many strangers are only counted
        server.ask(server.key("reader"), "POST", "/v1/completions", {"prompt": "x"})
        assert {name: last(server)[name] for name in ("action", "decision", "status")} == {
            "action": "completions",
            "decision": "deny",
            "status": 403,
        }
        key = server.key("user")
        server.ask(key + "x", "GET", "/v1/models")
        record = last(server)
        assert (record["who"], record["status"], record["reason"]) == ("-", 401, "key: wrong, expired or revoked")
        assert key[14:] not in json.dumps(server.records())


def test_texts_are_in_the_audit_only_when_asked_for(tmp_path):
    with guarded(tmp_path / "texts", texts=True) as server:
        server.complete(server.key(), "the mesh of a run")
        assert json.loads(last(server)["text"])["prompt"] == "the mesh of a run"


def test_models(server, keys):
    answer = server.complete(keys["small"])
    assert (answer.status, answer.json["error"]["param"]) == (403, "model")
    assert server.complete(server.key(models=("other", "x*"))).status == 403
    assert server.complete(server.key(models=("x*", "dou*"))).status == 200


def test_a_model_without_a_name_is_not_every_model(server, keys, monkeypatch):
    monkeypatch.setattr(server.app.state.service, "name", "")
    assert server.complete(server.key(models=("other", "x*"))).status == 403
    assert server.complete(keys["small"]).status == 403
    assert server.ask(server.key(models=("other",)), "POST", "/tokenize", {"prompt": "x"}).status == 200


def test_what_no_minute_of_a_role_can_hold_is_refused_for_good(server, keys):
    assert server.complete(keys["few"], max_tokens=9).status == 200
    answer = server.complete(keys["few"], max_tokens=100)
    assert (answer.status, answer.json["error"]["code"]) == (400, "context_length_exceeded")
    assert answer.message.endswith("but all with role 'few' together may use 100 in its window")


def test_limits_of_a_key(server):
    key = server.key(limits={"requests_a_minute": 2})
    assert [server.complete(key).status for _ in range(3)] == [200, 200, 429]
    answer = server.complete(key)
    assert answer.json["error"]["type"] == "rate_limit_error"
    assert answer.message == "beyond the limit of 2 requests a minute"
    assert 50 < int(answer.headers["retry-after"]) <= 62
    rotated = server.opened.keys.rotate(key[:13], made_by="test")[1]
    assert server.complete(rotated).status == 429  # a new key is no new quota
    assert server.ask(key, "POST", "/tokenize", {"prompt": "x"}).status == 429
    assert server.ask(key, "GET", "/v1/models").status == 200


def test_what_was_not_generated_is_given_back(server):
    key = server.key(limits={"tokens_a_minute": 100})
    before, server.engine.script = server.engine.script, saying("hi")
    used = [server.complete(key, "the mesh", 50).json["usage"]["total_tokens"] for _ in range(5)]
    server.engine.script = before
    prompt = used[0] - 2
    assert max(used) < 10
    left = 100 - sum(used)
    assert server.complete(key, "the mesh", left - prompt + 1).status == 429
    assert server.complete(key, "the mesh", left - prompt).status == 200
    assert server.complete(key, "the mesh", 0).status == 429


def test_what_the_server_has_no_room_for_costs_nothing(server):
    key = server.key(limits={"requests_a_minute": 1, "tokens_a_minute": 50})
    server.engine.max_waiting = 0
    assert [server.complete(key, "the mesh", 30).status for _ in range(3)] == [503] * 3
    server.engine.max_waiting = 256
    assert [server.complete(key, "the mesh", 30).status for _ in range(2)] == [200, 429]


def test_limits_of_a_role_together(server):
    keys = [server.key("two") for _ in range(3)]
    assert sorted(server.complete(key).status for key in keys) == [200, 200, 429]


def test_tokens_beyond_what_a_key_may_ever_have(server, keys):
    answer = server.complete(keys["user"], "the mesh", 300)
    assert (answer.status, answer.json["error"]["code"]) == (400, "context_length_exceeded")
    assert "+ 300 new ones = " in answer.message
    assert answer.message.endswith("but this key may use 200 in one request")
    answer = server.complete(server.key(limits={"tokens_a_minute": 10}), "the mesh", 20)
    assert answer.status == 400


def test_requests_at_once(server):
    key = server.key(limits={"concurrent": 1})
    server.engine.seconds = 0.05
    try:
        running = threading.Thread(target=lambda: server.complete(key, "the mesh", 20))
        running.start()
        time.sleep(0.4)
        assert server.complete(key).status == 429
        running.join()
    finally:
        server.engine.seconds = 0
    assert server.complete(key).status == 200


def test_revoked_at_once(server):
    key = server.key()
    assert server.complete(key).status == 200
    server.opened.keys.revoke(key[:13])
    assert server.complete(key).status == 401


def test_keys_over_http(server, keys):
    made = server.ask(keys["admin"], "POST", "/v1/keys", {"role": "user", "name": "bob", "limits": {"concurrent": 3}})
    assert (made.status, made.headers["cache-control"]) == (200, "no-store")
    assert server.complete(made.json["key"]).status == 200
    listed = server.ask(keys["admin"], "GET", "/v1/keys")
    assert made.json["id"] in {key["id"] for key in listed.json["data"]}
    assert made.json["key"] not in listed.text
    assert "digest" not in listed.text
    assert server.ask(keys["admin"], "DELETE", f"/v1/keys/{made.json['id']}").status == 200
    assert server.complete(made.json["key"]).status == 401
    assert server.ask(keys["admin"], "DELETE", "/v1/keys/im-x").status == 404
    actions = [record for record in server.records() if record.get("subject") == made.json["id"]]
    assert [(record["action"], record["who"]) for record in actions] == [
        ("keys create", keys["admin"][:13]),
        ("keys revoke", keys["admin"][:13]),
    ]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"role": "king"}, 400),
        ({"role": "user", "limits": {"speed": 1}}, 400),
        ({"role": "user", "limits": {"concurrent": -1}}, 400),
        ({"role": "user", "name": "a\nb"}, 400),
        ({"role": "user", "models": []}, 400),
        ({"role": "user", "expires_in": 0}, 400),
        ({"name": "bob"}, 400),
        ([], 400),
    ],
)
def test_keys_that_cannot_be(server, keys, body, status):
    assert server.ask(keys["admin"], "POST", "/v1/keys", body).status == status


def test_nobody_makes_a_key_that_may_do_more(server, keys):
    assert server.ask(keys["helper"], "POST", "/v1/keys", {"role": "admin"}).status == 403
    assert server.ask(keys["helper"], "POST", "/v1/keys", {"role": "user"}).status == 403
    assert server.ask(keys["helper"], "POST", "/v1/keys", {"role": "helper"}).status == 200
    assert server.ask(keys["helper"], "DELETE", f"/v1/keys/{keys['admin'][:13]}").status == 403
    assert server.ask(keys["user"], "POST", "/v1/keys", {"role": "user"}).status == 403


def test_who_is_no_admin_makes_no_key_of_another_tenant_nor_leaves_their_limits(server, keys):
    helper = server.key("helper", tenant="ours")
    makes = lambda key, **more: server.ask(key, "POST", "/v1/keys", {"role": "helper", **more})
    assert makes(helper, tenant="ours").json["tenant"] == "ours"
    assert makes(helper).json["tenant"] not in ("ours", "acme")
    assert (makes(helper, tenant="acme").status, makes(keys["admin"], tenant="acme").status) == (403, 200)
    answer = makes(server.key("helper", limits={"concurrent": 3}))
    assert (answer.status, answer.json["error"]["code"]) == (403, "permission_denied")


def test_a_full_disk_under_the_audit(tmp_path, monkeypatch):
    """An admin's action is refused; users are served, and written down once there is room."""
    with guarded(tmp_path / "full") as server:
        admin, user = server.key("admin"), server.key()
        assert server.complete(user).status == 200
        monkeypatch.setattr(audit.os, "write", full_disk)
        answer = server.ask(admin, "POST", "/v1/keys", {"role": "user"})
        assert (answer.status, answer.message) == (503, "refused: the audit cannot be written")
        assert server.ask(admin, "POST", "/drain").status == 503
        assert server.complete(user).status == 200
        monkeypatch.undo()
        assert server.ask(admin, "GET", "/v1/keys").status == 200
        assert len(server.opened.keys.all()) == 2
        assert [record["action"] for record in server.records()] == ["completions", "completions", "keys"]
        chain = verify.chains(server.opened.folder / audit.FOLDER)[0]
        assert verify.verify(server.opened.folder / audit.FOLDER, chain, server.opened.secret, {}).fault is None


def full_disk(file, data):
    raise OSError(28, "No space left on device")


def test_strict_refuses_what_cannot_be_written_down(tmp_path, monkeypatch):
    with guarded(tmp_path / "strict", strict=True) as server:
        user = server.key()
        assert server.complete(user).status == 200
        with monkeypatch.context() as patched:
            patched.setattr(audit.os, "write", full_disk)
            assert server.complete(user).status == 503
        assert server.complete(user).status == 200


def test_another_writer_is_waited_for_in_a_thread(server):
    """As where many replicas share a database: the event loop goes on, and the limit holds."""
    key, answers = server.key(limits={"concurrent": 1, "requests_a_minute": 2}), []
    with server.opened.store.engine.begin() as connection:  # holds the one lock of SQLite
        asking = threading.Thread(target=lambda: answers.append(server.complete(key).status))
        asking.start()
        for _ in range(5):
            assert server.ask(None, "GET", "/livez").status == 200
        assert answers == []
        assert connection.execute(select(func.count()).select_from(store.USED)).scalar_one() >= 0
    asking.join()
    assert answers == [200]
    assert [server.complete(key).status for _ in range(2)] == [200, 429]


def test_a_database_that_is_away(server, monkeypatch):
    """A request waits for it a while; then it is refused, and nobody is let in unseen."""
    key = server.key(limits={"concurrent": 1})
    away = threading.Event()
    real = store.Store.run

    def run(self, what, **how):
        if away.is_set():
            raise store.Unreachable("gone")
        return real(self, what, **how)

    monkeypatch.setattr(store.Store, "run", run)
    away.set()
    threading.Timer(0.07, away.clear).start()
    assert server.complete(key).status == 200
    away.set()
    answer = server.complete(key)
    assert (answer.status, answer.message) == (503, "the keys cannot be looked up now")
    assert int(answer.headers["retry-after"]) == 5
    away.clear()
    assert server.complete(key).status == 200
    # gone between admission and end: the answer is whole, and the room is given back later
    server.engine.seconds = 0.05
    running = threading.Thread(target=lambda: server.complete(key, "the mesh", 10))
    running.start()
    time.sleep(0.3)
    away.set()
    running.join()
    server.engine.seconds = 0
    away.clear()
    assert server.door._unsettled
    deadline = time.monotonic() + 5
    while server.door._unsettled and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.complete(key).status == 200
