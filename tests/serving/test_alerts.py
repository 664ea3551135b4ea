"""Alert rules, dashboard and example of a configuration: valid, and about metrics that a server or a run exports."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from doubles import EngineDouble

from serving.metrics import Metrics
from serving.service import Service
from serving.watch import Record
from tracking.prometheus import BESIDE, KEYS

ALERTS = Path(__file__).parents[2] / "serving/alerts"
RULES = {name: yaml.safe_load((ALERTS / f"{name}.yml").read_text()) for name in ("server", "trainer")}
BOARD = json.loads((ALERTS / "dashboard.json").read_text())
WORDS = [
    "and",
    "or",
    "unless",
    "by",
    "on",
    "sum",
    "min",
    "max",
    "rate",
    "increase",
    "deriv",
    "time",
    "absent",
    "offset",
    "le",
    "avg_over_time",
    "max_over_time",
    "min_over_time",
    "quantile_over_time",
    "histogram_quantile",
    "count",
]  # of PromQL: they are no metrics


def promtool(*arguments: str) -> None:
    run = subprocess.run(["promtool", *arguments], cwd=ALERTS, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def expressions() -> dict[str, str]:
    """Everything that is asked of Prometheus, by where it stands."""
    rules = {
        f"{file}: {rule.get('alert', rule.get('record'))}": rule["expr"]
        for file, groups in RULES.items() for group in groups["groups"] for rule in group["rules"]
    }  # fmt: skip
    targets = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in BOARD["panels"] for target in panel.get("targets", ())
    }  # fmt: skip
    return rules | targets


def exported() -> set[str]:
    """The names in what a server and a run answer, with those of recording rules and Prometheus' own."""
    metrics = Metrics(Service(EngineDouble(), "m", "d" * 64), 16)
    metrics.request(Record("req-1", "GET", "/", "", None, route="/", status=200), [])
    server = {line.partition(" ")[0].partition("{")[0] for line in metrics.text().splitlines() if line[0] != "#"}
    trainer = {f"isomesh_{metric.name}" for metric in (*KEYS.values(), *BESIDE)}
    rules = (rule for groups in RULES.values() for group in groups["groups"] for rule in group["rules"])
    recorded = {rule["record"] for rule in rules if "record" in rule}
    return server | trainer | recorded | {"up"}


def metrics_in(expression: str) -> set[str]:
    """The metrics that an expression of PromQL names."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on) \([^)]*\)", " ", expression)
    return set(re.findall(r"[a-zA-Z_][\w:]*", bare)) - {*WORDS, "h"}


@pytest.mark.parametrize("name", RULES)
def test_rules_are_valid_and_fire_when_they_should(name):
    promtool("check", "rules", f"{name}.yml")
    promtool("test", "rules", f"{name}_test.yml")


def test_every_alert_is_tested_and_says_what_to_do():
    for name, groups in RULES.items():
        tests = yaml.safe_load((ALERTS / f"{name}_test.yml").read_text())
        cases = [case for test in tests["tests"] for case in test.get("alert_rule_test", ())]
        asked = str([test.get("promql_expr_test") for test in tests["tests"]])
        fired = {case["alertname"] for case in cases if case.get("exp_alerts")}
        for rule in (rule for group in groups["groups"] for rule in group["rules"] if "alert" in rule):
            assert rule["alert"] in fired or f'alertname="{rule["alert"]}"' in asked, rule["alert"]
            assert rule["labels"]["severity"] in ("page", "warn")
            assert rule["annotations"].keys() == {"summary", "description"}


def test_all_that_is_asked_for_is_exported():
    there, asked = exported(), expressions()
    assert len(asked) > 50
    for where, expression in asked.items():
        names = metrics_in(expression)
        assert names, where
        assert names <= there, f"{where}: {names - there} are not exported"


def test_every_expression_of_the_dashboard_is_promql(tmp_path):
    fill = lambda text: text.replace("$__rate_interval", "1m").replace("$model_name", "m")
    rules = [{"record": f"panel:{n}", "expr": fill(text)} for n, text in enumerate(expressions().values())]
    (tmp_path / "all.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "all.yml"))


def test_the_dashboard_can_be_imported():
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert {"title", "uid", "schemaVersion", "panels", "templating"} <= BOARD.keys()
    taken = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies over another"
        taken |= cells
    variables = {one["name"] for one in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD))) - {"__rate_interval"}
    assert used == variables


def test_the_example_configuration_is_valid():
    promtool("check", "config", "prometheus.yml")
