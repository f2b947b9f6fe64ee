"""The files of deploy/ against the program they start: flags, ports, paths, times. `make lint-deploy` looks at their form."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from pgfast.engine import Engine
from pgfast.server.app import build_app
from pgfast.server.cli import serve
from pgfast.server.config import ServerConfig
from pgfast.server.metrics import Metrics

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
TIME_TO_END = 3.0
"""Seconds beyond --drain-timeout: uvicorn's last second and the end of the process."""


def parse(words: list[str]) -> dict[str, Any]:
    """Parse the words after `pgfast` as the program itself would."""
    assert words[0] == "serve"
    with serve.make_context("serve", words[1:]) as context:
        return context.params


@pytest.fixture(scope="module")
def dockerfile() -> dict[str, list[str]]:
    """Instructions to their arguments, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE))
    found: dict[str, list[str]] = {}
    for line in filter(None, text.splitlines()):
        word, rest = line.split(maxsplit=1)
        found.setdefault(word, []).append(rest)
    return found


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    """Kubernetes objects by kind."""
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "cpu" / "pgfast.yaml").read_text())
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def pod(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return objects["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return container


def unit_values(name: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", (DEPLOY / name).read_text(), re.MULTILINE)


def nginx_value(name: str) -> str:
    (value,) = re.findall(rf"^\s*{name} (.*);$", (DEPLOY / "nginx.conf").read_text(), re.MULTILINE)
    return value


@pytest.fixture(scope="module")
def paths(demo: Engine) -> set[str]:
    app = build_app(demo, ServerConfig())
    app.state.service.close()
    return {route.path for route in app.routes}


def test_the_image_starts_the_server_where_it_says(dockerfile: dict[str, list[str]]) -> None:
    (entry,), (command,) = dockerfile["ENTRYPOINT"], dockerfile["CMD"]
    assert json.loads(entry) == ["pgfast"]
    given = parse(json.loads(command))
    assert given["host"] == "0.0.0.0"
    assert [str(given["port"])] == dockerfile["EXPOSE"]
    assert dockerfile["STOPSIGNAL"] == ["SIGTERM"]


def test_the_image_is_built_from_the_sources_that_the_context_has(dockerfile: dict[str, list[str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*"
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {word for line in dockerfile["COPY"] if "--from" not in line for word in line.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    folders = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    assert folders | {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]} <= copied
    extras = set(re.findall(r"\[([a-z,]+)\]\"", " ".join(dockerfile["RUN"])))
    assert extras == {"cpu,serve", "gpu,serve"}
    assert {extra for group in extras for extra in group.split(",")} <= set(project["project"]["optional-dependencies"])


def test_every_variant_of_the_image_runs_as_a_user_without_rights(
    dockerfile: dict[str, list[str]], pod: dict[str, Any]
) -> None:
    (user,) = dockerfile["USER"]
    context = pod["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert context["runAsNonRoot"] is True
    bases = dict(reversed(stage.split(" AS ")) for stage in dockerfile["FROM"])
    assert bases["cpu"] == bases["gpu"] == "runtime"  # which has the USER, the check and the command
    text = (DEPLOY / "Dockerfile").read_text()
    assert text.index("AS runtime") < text.index("\nUSER ") < text.index("AS gpu") < text.index("AS cpu")  # cpu by default


class Health(BaseHTTPRequestHandler):
    status = 200
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def health() -> Iterator[HTTPServer]:
    Health.asked = []
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_images_health_check_asks_healthz(
    dockerfile: dict[str, list[str]], health: HTTPServer, paths: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = json.loads(dockerfile["HEALTHCHECK"][0].split("CMD", 1)[1])
    (exposed,) = dockerfile["EXPOSE"]
    assert command[:2] == ["python", "-c"]
    assert exposed in command[2]
    code = command[2].replace(exposed, str(health.server_port))
    for status, wanted in ((200, 0), (503, 1)):
        monkeypatch.setattr(Health, "status", status)
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == wanted
    assert set(Health.asked) == {"/healthz"} <= paths


def test_the_unit_starts_the_server_and_waits_for_its_end() -> None:
    (command,) = unit_values("pgfast.service", "ExecStart")
    program, *words = shlex.split(command)
    assert program.endswith("/bin/pgfast")
    given = parse(words)
    assert given["host"] == "127.0.0.1"
    (stop,) = unit_values("pgfast.service", "TimeoutStopSec")
    assert float(stop) >= given["drain_timeout"] + TIME_TO_END
    (credential,) = unit_values("pgfast.service", "LoadCredential")
    assert str(given["api_key_file"]) == "${CREDENTIALS_DIRECTORY}/" + credential.split(":")[0]
    # click's and our own status for mistakes of the user
    assert unit_values("pgfast.service", "RestartPreventExitStatus") == [str(click.UsageError.exit_code)]


def test_the_units_model_is_where_pgfast_looks() -> None:
    (line,) = unit_values("pgfast.service", "Environment")
    (option,) = (option for option in serve.params if option.name == "model")
    assert line.split("=")[0] == option.envvar == "PGFAST_MODEL"


def test_the_pod_starts_the_server_with_its_model_and_keys(container: dict[str, Any], pod: dict[str, Any]) -> None:
    environment = {entry["name"]: entry for entry in container["env"]}
    words = []
    for word in container["args"]:
        for name in re.findall(r"\$\((\w+)\)", word):
            assert environment[name]["valueFrom"]["resourceFieldRef"]["resource"] == "limits.cpu"
            word = word.replace(f"$({name})", container["resources"]["limits"]["cpu"])
        words.append(word)
    given = parse(words)
    assert given["threads"] == 4
    assert given["host"] == "0.0.0.0"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert all(mount["readOnly"] for mount in container["volumeMounts"])
    assert "persistentVolumeClaim" in volumes[mounts[environment["PGFAST_MODEL"]["value"]]]
    assert "secret" in volumes[mounts[str(given["api_key_file"].parent)]]


def test_the_pod_ends_after_its_answers(container: dict[str, Any], pod: dict[str, Any]) -> None:
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    drain = parse([word.replace("$(PGFAST_CORES)", "4") for word in container["args"]])["drain_timeout"]
    assert pod["terminationGracePeriodSeconds"] >= float(seconds) + drain + TIME_TO_END


def test_probes_and_ports_agree(container: dict[str, Any], objects: dict[str, dict[str, Any]], paths: set[str]) -> None:
    (port,) = container["ports"]
    assert f"--port={port['containerPort']}" in container["args"]
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/healthz",  # the port is closed while the model loads
        "liveness": "/healthz",  # a server that drains is not ready, and must not be killed for it
        "readiness": "/readyz",
    }
    assert {probe["path"] for probe in probes.values()} <= paths
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]


def test_everything_means_the_same_pods(objects: dict[str, dict[str, Any]]) -> None:
    spec = objects["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    selectors = [
        spec["selector"]["matchLabels"],
        spec["template"]["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors)
    assert objects["PodDisruptionBudget"]["spec"]["minAvailable"] < spec["replicas"]


def test_the_pod_has_no_rights(container: dict[str, Any], pod: dict[str, Any]) -> None:
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_the_gpu_variant_adds_flags_that_exist(container: dict[str, Any]) -> None:
    gpu = yaml.safe_load((DEPLOY / "kubernetes" / "gpu" / "kustomization.yaml").read_text())
    added = [step["value"] for step in yaml.safe_load(gpu["patches"][0]["patch"]) if step["path"].endswith("/args/-")]
    assert parse([word.replace("$(PGFAST_CORES)", "4") for word in container["args"]] + added)["provider"] == "cuda"


def test_the_autoscaler_looks_at_a_metric_that_there_is(demo: Engine, objects: dict[str, dict[str, Any]]) -> None:
    scaler = yaml.safe_load((DEPLOY / "kubernetes" / "autoscaling.yaml").read_text())["spec"]
    names = {metric.name for metric in Metrics(demo).registry.collect()}
    demo.on_step = None
    assert scaler["metrics"][0]["pods"]["metric"]["name"] in names
    assert scaler["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert scaler["minReplicas"] == objects["Deployment"]["spec"]["replicas"]


def test_nginx_lets_through_what_the_server_takes(paths: set[str]) -> None:
    config = ServerConfig()
    (command,) = unit_values("pgfast.service", "ExecStart")
    given = parse(shlex.split(command)[1:])
    assert nginx_value("server") == f"{given['host']}:{given['port']}"
    assert nginx_value("client_max_body_size") == f"{config.max_body // 2**20}m"
    assert float(nginx_value("proxy_read_timeout").removesuffix("s")) > config.timeout
    assert float(nginx_value("keepalive_timeout").removesuffix("s")) < config.keep_alive
    assert nginx_value("proxy_buffering") == "off"
    assert nginx_value("proxy_set_header Host") == "$http_host"
    (hidden,) = re.findall(r"location ~ \^/\((.*)\)\$", (DEPLOY / "nginx.conf").read_text())
    assert {f"/{name}" for name in hidden.split("|")} <= paths


def test_the_documentation_names_files_and_flags_that_exist() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    for name in re.findall(r"deploy/[\w./-]+", text):
        assert (ROOT / name).exists(), name
    flags = {flag for option in serve.params for flag in option.opts}
    for line in re.findall(r"pgfast serve (.*)", text):
        assert {word.split("=")[0] for word in line.split() if word.startswith("--")} <= flags, line
