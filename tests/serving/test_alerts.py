"""Alert rules and dashboard are about metrics that a server or a run exports; tests/long/test_promtool.py runs them."""

import json
import re
from pathlib import Path

import yaml
from doubles import EngineDouble

from serving.metrics import Metrics
from serving.service import Service
from serving.watch import Record
from tracking.prometheus import BESIDE, KEYS

ALERTS = Path(__file__).parents[2] / "serving/alerts"
RULES = {name: yaml.safe_load((ALERTS / f"{name}.yml").read_text()) for name in ("server", "trainer")}
BOARD = json.loads((ALERTS / "dashboard.json").read_text())
WORDS = re.compile(  # of PromQL: they are no metrics
    "and|or|unless|by|on|sum|min|max|rate|increase|deriv|time|absent|offset|le|count|h|"
    "(avg|max|min|quantile)_over_time|histogram_quantile"
)


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
    return {name for name in re.findall(r"[a-zA-Z_][\w:]*", bare) if not WORDS.fullmatch(name)}


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
