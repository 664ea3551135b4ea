"""The page's files: who gets them, what they may do in a browser, and that they are small and ask nobody else."""

import re

import pytest
from doubles import EngineDouble, OpenGate, chat_template
from fastapi.testclient import TestClient
from guarded import guarded

from serving.app import create_app
from serving.page.router import FILES, router
from serving.service import Service


@pytest.fixture(scope="module")
def client():
    engine = EngineDouble()
    engine.start()
    with TestClient(create_app(Service(engine, "double", "d0" * 32, chat_template()), OpenGate(), [router])) as client:
        yield client
    engine.stop()


def test_every_file_that_the_page_names_is_served(client):
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    named = {name for text in FILES.values() for name in re.findall(r'"(?:\./|page/)([\w.]+)"', text.decode())}
    assert named == FILES.keys() - {"index.html"}
    for name in named:
        answer = client.get(f"/page/{name}")
        assert answer.status_code == 200
        assert answer.content == FILES[name]


@pytest.mark.parametrize("name", ["router.py", "__init__.py", "..%2fapp.py", "%2e%2e%2fapp.py", "none.js", ""])
def test_nothing_else_is_served(client, name):
    assert client.get(f"/page/{name}").status_code == 404


def test_the_policy_lets_in_nothing_from_elsewhere(client):
    headers = client.get("/").headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert all(value in ("'self'", "'none'", "'script'") for value in policy.values())
    assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_files_are_small_and_name_no_other_address():
    assert sum(map(len, FILES.values())) < 60_000
    for name, text in FILES.items():
        addresses = re.findall(r"https?://[^\s\"'`)]+", text.decode())
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, name
        assert len(text.decode().splitlines()) < 500
        if name.endswith((".js", ".html")):
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\son\w+=|style=", text.decode()
            )
    assert b"localStorage" not in b"".join(FILES.values())


def test_only_who_may_see_the_page_gets_it(tmp_path):
    policy = "p, blind, models, *\n"  # a role that may not
    with guarded(tmp_path, policy=policy) as server:
        assert server.ask(None, "GET", "/").status == 401
        assert "Basic" in server.ask(None, "GET", "/page/page.js", accept="text/html").headers["www-authenticate"]
        # a password in the address is sent with the styles only when they are asked for it
        assert "Basic" in server.ask(None, "GET", "/page/page.css", accept="text/css").headers["www-authenticate"]
        assert server.ask(server.key("user"), "GET", "/").status == 200
        assert server.ask(server.key("user"), "GET", "/page/page.js").status == 200
        assert server.ask(server.key("blind"), "GET", "/").status == 403
