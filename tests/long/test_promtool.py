"""Prometheus' own promtool (Debian's package) on what is exported, on the alert rules and on the dashboard."""

import subprocess

import pytest
import yaml

# `seen` and `sink` are fixtures: a server that has answered, a run's exporter
from tests.serving.test_alerts import ALERTS, RULES, expressions
from tests.serving.test_metrics import seen  # noqa: F401
from tests.tracking.test_prometheus import exposition_of_a_run, scrape, sink  # noqa: F401
from tracking.prometheus import KEYS


def promtool(*arguments: str, text: str | None = None) -> list[str]:
    """What it says of files, or of metrics in its input: nothing where all is well."""
    run = subprocess.run(["promtool", *arguments], cwd=ALERTS, input=text, capture_output=True, text=True)
    assert text is not None or run.returncode == 0, run.stdout + run.stderr
    return (run.stdout + run.stderr).splitlines()


@pytest.mark.parametrize("name", RULES)
def test_rules_are_valid_and_fire_when_they_should(name):
    promtool("check", "rules", f"{name}.yml")
    promtool("test", "rules", f"{name}_test.yml")


def test_every_expression_of_the_dashboard_is_promql(tmp_path):
    fill = lambda text: text.replace("$__rate_interval", "1m").replace("$model_name", "m")
    rules = [{"record": f"panel:{n}", "expr": fill(text)} for n, text in enumerate(expressions().values())]
    (tmp_path / "all.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "all.yml"))


def test_the_example_configuration_is_valid():
    promtool("check", "config", "prometheus.yml")


def test_of_a_server_only_the_colon_in_vllms_names_is_said(seen):  # noqa: F811
    said = promtool("check", "metrics", text=seen.text())
    assert {line.partition(" ")[2] for line in said} == {"metric names should not contain ':'"}
    assert all(line.startswith("vllm:") for line in said)
    assert promtool("check", "metrics", text=seen.text().replace("vllm:", "vllm_")) == []


def test_of_every_key_that_a_run_may_log_nothing_is_said(sink):  # noqa: F811
    sink.log(1, {"tokens": 1, **{key + "a/b" if key.endswith("/") else key: 1.0 for key in KEYS}})
    assert promtool("check", "metrics", text=scrape(sink.port)) == []


def test_of_a_real_run_nothing_is_said(tmp_path, monkeypatch):
    assert promtool("check", "metrics", text=exposition_of_a_run(tmp_path, monkeypatch)) == []
