"""The files of the example with Docker: that they fit each other, its page, and the programs named.

No container is run here: what the containers run is run as processes.
"""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from itertools import combinations
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import yaml

from kamal_proxy.cli.commands import find_command
from tests.e2e.programs import needs
from tests.pages import FENCED
from tests.running import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE = ROOT / "example"
LOCALHOST = "127.0.0.1"
COMPOSE = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
PAGE = (EXAMPLE / "README.md").read_text()
PROMETHEUS = yaml.safe_load((EXAMPLE / "prometheus" / "prometheus.yml").read_text())
DASHBOARD = json.loads((EXAMPLE / "grafana" / "dashboards" / "kamal-proxy.json").read_text())


def mounts(service: str) -> dict[str, str]:
    """Return what a service has mounted: the path in the container, and what is there."""
    pairs = [volume.removesuffix(":ro").split(":") for volume in SERVICES[service]["volumes"]]
    return {inside: source for source, inside in pairs}


def published(service: str) -> dict[str, str]:
    """Return the published ports of a service, and the ports in the container that these are."""
    pairs = [port.removeprefix(f"{LOCALHOST}:").split(":") for port in SERVICES[service]["ports"]]
    return dict(pairs)


def flag(service: str, name: str) -> str:
    """Return the value of a flag of a service's command."""
    (value,) = re.findall(rf"--{name}=(\S+)", SERVICES[service]["command"])
    return str(value)


# --- compose.yaml --------------------------------------------------------------------------------


def has_compose() -> bool:
    """Tell whether Docker has its plugin Compose; no engine is needed."""
    if shutil.which("docker") is None:
        return False
    done = subprocess.run(["docker", "compose", "version"], check=False, capture_output=True)
    return done.returncode == 0


@pytest.mark.skipif(not has_compose(), reason="Docker's plugin Compose is not installed")
def test_compose_takes_its_file() -> None:
    done = subprocess.run(
        ["docker", "compose", "--profile", "load", "config", "--format", "json"],
        check=False,
        capture_output=True,
        cwd=EXAMPLE,
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["services"]) == set(SERVICES)


def test_what_is_mounted_exists() -> None:
    for service in SERVICES:
        for source in mounts(service).values():
            if source.startswith("."):
                assert (EXAMPLE / source).exists(), f"{service}: {source}"
            else:
                assert source in COMPOSE["volumes"], f"{service}: {source}"
    assert (EXAMPLE / SERVICES["proxy"]["build"] / "Dockerfile").exists()


def test_ports_are_published_on_this_machine_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith(f"{LOCALHOST}:") for port in ports)


def test_the_proxys_variables_are_options_of_run() -> None:
    flags = find_command(["run"])[0].grammar.flags
    known = {f"KAMAL_PROXY_{name.upper().replace('-', '_')}" for name in flags}
    assert set(SERVICES["proxy"]["environment"]) <= known


def test_the_state_is_in_a_volume() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (home,) = re.findall(r"^WORKDIR (/home/\S+)$", dockerfile, re.MULTILINE)
    assert f"{home}/.config/kamal-proxy" in mounts("proxy")


def test_there_are_four_replicas_of_two_versions() -> None:
    replicas = [name for name in SERVICES if name.startswith("web-")]
    assert [flag(name, "version") for name in replicas] == ["v1", "v1", "v2", "v2"]
    for name in replicas:
        assert name == f"web-{flag(name, 'name')}"


def shell_line(service: str, **instead: str) -> str:
    """Return a service's command with other values of flags, and Python without packages.

    The image of the service has the standard library only.
    """
    assert mounts(service) == {f"{SERVICES[service]['working_dir']}/example": "."}
    line: str = SERVICES[service]["command"].replace("python3", f"{sys.executable} -S")
    for name, value in instead.items():
        line, count = re.subn(rf"--{name}=\S+", f"--{name}={value}", line)
        assert count == 1, f"{service} has no --{name}"
    return line


@contextmanager
def running(service: str) -> Iterator[int]:
    """Run what a service's container runs, on a free port of this machine, and provide the port."""
    command = shlex.split(shell_line(service, host=LOCALHOST, port="0"))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield int(line.rpartition(f" listening on {LOCALHOST}:")[2])
        finally:
            process.kill()


@pytest.mark.parametrize(
    "service", [name for name in SERVICES if name.startswith(("web-", "game-"))]
)
def test_what_is_deployed_runs_with_the_standard_library(service: str) -> None:
    with running(service) as port:
        assert port


@pytest.mark.parametrize(
    ("load", "server"),
    [("visitors", "web-v1-a"), ("chatters", "web-v1-b"), ("players", "game-v2")],
)
def test_a_load_says_who_answered_and_ends_with_its_input(load: str, server: str) -> None:
    assert SERVICES[load]["stdin_open"]
    with running(server) as port:
        command = shlex.split(shell_line(load, host=LOCALHOST, port=str(port)))
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            who = re.search(r"--name=(\S+)", SERVICES[server]["command"])
            name = who[1] if who else flag(server, "version")
            line = process.stdout.readline()
            process.stdin.close()
            rest = process.stdout.read()

    assert re.fullmatch(rf"\d+ sent, 0 lost; last second: \d+ by {name}\n", line)
    assert re.fullmatch(r"\d+ sent, 0 lost", rest.splitlines()[-1]), rest
    assert process.returncode == 0


# --- README.md -----------------------------------------------------------------------------------

COMMANDS = [
    shlex.split(line)
    for language, block in FENCED.findall(PAGE)
    for line in block.splitlines()
    if language == "sh"
]


def test_the_commands_of_the_page_name_services() -> None:
    named: set[str] = set()
    for words in COMMANDS:
        if words[:2] != ["docker", "compose"]:
            continue
        rest = [word for word in words[2:] if not word.startswith("--") and word != "load"]
        named.update(rest[1:2] if rest[0] == "exec" else rest[1:])
    assert {"proxy", "web-v1-a", "web-v2-a", "visitors", "players"} <= named <= set(SERVICES)


def test_the_deploys_of_the_page_name_targets_and_ports() -> None:
    deploys = [words for words in COMMANDS if {"deploy", "deploy-udp"} & set(words)]
    assert len(deploys) > 4
    for words in deploys:
        targets = [word.removeprefix("--target=") for word in words if "--target=" in word]
        assert targets
        for target in targets:
            service, _, port = target.partition(":")
            assert port == flag(service, "port"), target
        for word in words:
            if word.startswith("--port="):
                assert published("proxy")[word.removeprefix("--port=")].endswith("/udp")
    # A server forgets a player before the proxy may take the next for the same one, and so long
    # nobody else gets the port of a match that is over.
    (timeout,) = {
        re.findall(r"--session-timeout=(\d+)s", " ".join(w))[0] for w in deploys if "game" in w
    }
    assert float(flag("game-v1", "forget-seconds")) < float(timeout)
    assert float(flag("players", "keep-seconds")) > float(timeout)


def test_the_addresses_of_the_page_are_published() -> None:
    addresses = set(re.findall(rf"http://{LOCALHOST}:(\d+)", PAGE))
    ports = {
        port for service in SERVICES if "ports" in SERVICES[service] for port in published(service)
    }
    assert len(addresses) == 3
    assert addresses <= ports


# --- Prometheus ----------------------------------------------------------------------------------


def test_prometheus_reads_the_proxys_metrics() -> None:
    (job,) = PROMETHEUS["scrape_configs"]
    port = SERVICES["proxy"]["environment"]["KAMAL_PROXY_METRICS_PORT"]
    assert job["static_configs"] == [{"targets": [f"proxy:{port}"]}]


@needs("promtool", package="prometheus")
def test_prometheus_likes_its_files() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", str(EXAMPLE / "prometheus" / "prometheus.yml")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "17 rules found" in done.stdout


def test_the_alerts_are_those_of_the_documentation() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text().partition("## What to alert on")[2]
    # One with a | can't be between backticks in a table.
    rows = re.findall(
        r"^\| (.+?) \| (?:`|<code>)(.+?)(?:`|</code>)(.*?) \|$",
        text.partition("\n## ")[0],
        re.MULTILINE,
    )
    listed = {what: html.unescape(expression) for what, expression, _ in rows}
    rules = yaml.safe_load((EXAMPLE / "prometheus" / "alerts.yml").read_text())["groups"][0][
        "rules"
    ]
    assert {rule["annotations"]["summary"]: rule["expr"] for rule in rules} == listed
    assert len({rule["alert"] for rule in rules}) == len(rules)
    later = [what for what, _, when in rows if when == " for a minute"]
    assert [rule["annotations"]["summary"] for rule in rules if "for" in rule] == later


# --- Grafana -------------------------------------------------------------------------------------


def provisioned(kind: str) -> Any:
    """Return the one file in a directory that Grafana reads at its start."""
    source = mounts("grafana")[f"/etc/grafana/provisioning/{kind}"]
    (path,) = (EXAMPLE / source).iterdir()
    return yaml.safe_load(path.read_text())


def test_grafana_finds_prometheus() -> None:
    (source,) = provisioned("datasources")["datasources"]
    url = urlsplit(source["url"])
    assert (url.hostname, str(url.port)) == ("prometheus", published("prometheus")["9090"])
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    used = {one["datasource"]["uid"] for one in everything_that_asks()}
    assert used == {source["uid"]}


def test_grafana_finds_the_dashboard() -> None:
    (provider,) = provisioned("dashboards")["providers"]
    source = mounts("grafana")[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    folder, _, name = home.rpartition("/")
    assert folder == provider["options"]["path"]
    assert (EXAMPLE / source / name).exists()


def everything_that_asks() -> list[dict[str, Any]]:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    return [*panels, *DASHBOARD["templating"]["list"], *DASHBOARD["annotations"]["list"]]


def test_the_dashboard_is_laid_out() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    for place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, f"{one} covers {other}"
    for panel in panels:
        if panel["type"] != "row":
            letters = [target["refId"] for target in panel["targets"]]
            assert letters == sorted(set(letters)), panel["title"]
            assert letters, panel["title"]


def test_the_dashboard_names_metrics_that_are_documented() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    web, udp = text.split("\n## UDP services\n")
    listed = {f"kamal_proxy_{name}" for name in re.findall(r"^\| `(\w+)` \|", web, re.MULTILINE)}
    listed |= {
        f"kamal_proxy_udp_{name}" for name in re.findall(r"^\| `(\w+)` \|", udp, re.MULTILINE)
    }
    used = set(re.findall(r"kamal_proxy_\w+|process_\w+", json.dumps(DASHBOARD)))
    plain = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    process = {name for name in plain if name.startswith("process_")}
    assert all(f"`{name}`" in text for name in process)
    assert plain - process <= listed
    # What the example does not have: certificates, attacks, and calls.
    assert listed - plain == {
        "kamal_proxy_certificate_attempts_total",
        "kamal_proxy_certificate_expiry_timestamp_seconds",
        "kamal_proxy_http_floods_total",
        "kamal_proxy_tls_handshakes_total",
        "kamal_proxy_udp_cut_unsaid_total",
        "kamal_proxy_udp_goodbyes_total",
        "kamal_proxy_udp_sessions_moved_total",
        "kamal_proxy_upgrades_total",
    }
