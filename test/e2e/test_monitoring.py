"""A real Prometheus scrapes a real server: every query of the dashboard and the rules gives data."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from blocklora_testing.case import ADMIN_KEY, Case
from blocklora_testing.server import Server, free_port

from benchmark.record import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
LIMIT_SECONDS = 60
VARIABLES = {"$adapter": ".*", "$instance": ".*", "$__rate_interval": "1m"}

pytestmark = pytest.mark.skipif(not (PROMETHEUS and PROMTOOL), reason="needs Debian's package prometheus")


class Prometheus:
    """Asks a Prometheus."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def ask(self, path: str, **asked: str) -> Any:
        with self._open(f"{self.url}{path}?{urllib.parse.urlencode(asked)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def numbers(self, query: str) -> list[float]:
        """Values of a query that are numbers."""
        found = [float(one["value"][1]) for one in self.ask("/api/v1/query", query=query)["result"]]
        return [value for value in found if not math.isnan(value)]


@pytest.fixture
def prometheus(api_server: Server, tmp_path: Path) -> Iterator[Prometheus]:
    """It scrapes ``api_server`` every 2 s and has our rules, which it asks as often."""
    config = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "2s"},
        "rule_files": [str(DEPLOY / "prometheus/rules.yaml")],
        "scrape_configs": [{"job_name": "sglang", "static_configs": [{"targets": [f"127.0.0.1:{api_server.port}"]}]}],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    flags = [f"--config.file={tmp_path / 'prometheus.yaml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(PROMETHEUS), *flags, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait()


def queries() -> dict[str, str]:
    """Title and number of each query of the dashboard -> the query, with what Grafana puts in."""
    found = {}
    for panel in json.loads((DEPLOY / "grafana/dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            found[f"{panel['title']}, {target['refId']}"] = query
    return found


def test_every_query_of_the_dashboard_gives_data(prometheus: Prometheus, api_server: Server, api_case: Case) -> None:
    def scraped() -> int:
        """Scrapes that came through."""
        try:
            found = prometheus.ask("/api/v1/query", query="sglang_blocklora:facts_age_seconds[10m]")["result"]
            return len(found[0]["values"])
        except (OSError, IndexError):
            return 0

    def wait_for_scrapes(count: int) -> None:
        end = time.monotonic() + LIMIT_SECONDS
        start = scraped()
        while scraped() < start + count:
            assert time.monotonic() < end
            time.sleep(0.2)

    body = {"lora_name": "watched", "lora_path": str(api_case.adapters["n4"])}
    wait_for_scrapes(1)
    for _ in range(2):  # rates are of what grows between two scrapes
        for adapter in ("sql", "support", None):
            api_server.tokens(api_case.prompts[0], adapter, 4)
        assert api_server.call("/v1/load_lora_adapter", body, key=ADMIN_KEY)[0] == 200
        api_server.tokens(api_case.prompts[1], "watched", 4)
        wait_for_scrapes(2)
        assert api_server.call("/v1/unload_lora_adapter", {"lora_name": "watched"}, key=ADMIN_KEY)[0] == 200
    asked = queries()
    assert len(asked) > 20
    assert {title for title, query in asked.items() if not prometheus.numbers(query)} == set()
    variables = json.loads((DEPLOY / "grafana/dashboard.json").read_text())["templating"]["list"]
    for variable in variables:
        match = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["query"])
        if match:
            assert prometheus.numbers(f"count by ({match[2]}) ({match[1]})"), variable["name"]
    (group,) = prometheus.ask("/api/v1/rules")["groups"]
    assert [rule["health"] for rule in group["rules"]] == ["ok"] * len(group["rules"])
    records = [rule["name"] for rule in group["rules"] if rule["type"] == "recording"]
    assert all(prometheus.numbers(name) for name in records)
    firing = [rule["name"] for rule in group["rules"] if rule["type"] == "alerting" and rule["state"] == "firing"]
    assert firing == []


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """``rules_test.yaml`` has a server for each, and a sound one."""
    shutil.copytree(DEPLOY / "prometheus", tmp_path / "rules")
    told = subprocess.run(
        [str(PROMTOOL), "test", "rules", "rules_test.yaml"], cwd=tmp_path / "rules", capture_output=True, text=True
    )
    assert told.returncode == 0, told.stdout + told.stderr
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yaml").read_text())["groups"][0]["rules"]
    tested = (DEPLOY / "prometheus/rules_test.yaml").read_text()
    assert [rule["alert"] for rule in rules if "alert" in rule and rule["alert"] not in tested] == []
