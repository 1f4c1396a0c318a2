"""The files in deploy/: valid by the schemas of Kubernetes and Compose, and true about the code that they deploy."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from jsonschema import Draft202012Validator
from tritonclient.grpc import service_pb2

from triton_models.launcher import checked_settings, default_models
from triton_models.processes import DEFAULT_PORTS
from triton_models.server_process import MODEL_REPOSITORY, OPENMP, TRITON_OPTIONS
from wisp_plugin.config import SETTINGS_VARIABLE
from wisp_plugin.errors import ConfigError
from wisp_plugin.telemetry import Telemetry

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
SCHEMAS = ROOT / "tests" / "schemas"
NO_RESOURCES = {"kustomization.yaml", "prometheus-adapter.yaml"}  # for kustomize and Helm, not for Kubernetes itself
PORTS = {DEFAULT_PORTS.grpc, DEFAULT_PORTS.http, DEFAULT_PORTS.metrics}
READY = "/v2/models/wisp_verifier/ready"


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@functools.cache
def resources() -> dict[str, dict[str, Any]]:
    """The manifests by kind: one of each."""
    loaded = [read_yaml(path) for path in sorted(KUBERNETES.glob("*.yaml")) if path.name not in NO_RESOURCES]
    by_kind = {resource["kind"]: resource for resource in loaded}
    assert len(by_kind) == len(loaded)
    return by_kind


def kubernetes_faults(resource: dict[str, Any]) -> list[str]:
    """What Kubernetes' own schema of its kind has against a resource."""
    (path,) = SCHEMAS.glob("kubernetes-*.json")
    schemas = json.loads(path.read_text(encoding="utf-8"))
    schema = schemas["kinds"][f"{resource['apiVersion']} {resource['kind']}"] | {"$defs": schemas["$defs"]}
    return [f"{list(e.path)}: {e.message}" for e in Draft202012Validator(schema).iter_errors(resource)]


def compose_faults(project: dict[str, Any]) -> list[str]:
    schema = json.loads((SCHEMAS / "compose-spec.json").read_text(encoding="utf-8"))
    return [f"{list(e.path)}: {e.message}" for e in Draft202012Validator(schema).iter_errors(project)]


# -- Kubernetes ---------------------------------------------------------------------------------------------------


def test_manifests_are_valid_and_complete() -> None:
    listed = set(read_yaml(KUBERNETES / "kustomization.yaml")["resources"])
    assert listed == {path.name for path in KUBERNETES.glob("*.yaml")} - NO_RESOURCES
    assert [fault for resource in resources().values() for fault in kubernetes_faults(resource)] == []
    kinds = {"ConfigMap", "Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
    assert set(resources()) == kinds


def test_the_schemas_see_faults() -> None:
    """The test above can fail: a misspelt field, a wrong type and a missing field are noticed."""
    for change in (
        lambda spec: spec["template"]["spec"]["containers"][0].update(imagePullPolcy="Always"),
        lambda spec: spec["template"]["spec"].update(terminationGracePeriodSeconds="30s"),
        lambda spec: spec.pop("selector"),
    ):
        broken = copy.deepcopy(resources()["Deployment"])
        change(broken["spec"])
        assert kubernetes_faults(broken)
    broken = copy.deepcopy(read_yaml(DEPLOY / "compose.yaml"))
    broken["services"]["server"]["shm-size"] = "1gb"
    assert compose_faults(broken)


def pod() -> dict[str, Any]:
    return resources()["Deployment"]["spec"]["template"]["spec"]


def test_the_parts_of_the_deployment_fit_together() -> None:
    deployment, service = resources()["Deployment"], resources()["Service"]
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    budget = resources()["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    for selector in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"], budget):
        assert selector.items() <= labels
    (container,) = pod()["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert set(ports.values()) == PORTS
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports
    assert service["spec"]["sessionAffinity"] == "ClientIP"
    volumes = [volume["name"] for volume in pod()["volumes"]]
    assert sorted(mount["name"] for mount in container["volumeMounts"]) == sorted(volumes)
    reference = container["env"][0]["valueFrom"]["configMapKeyRef"]
    settings = resources()["ConfigMap"]
    assert (container["env"][0]["name"], reference["name"]) == (SETTINGS_VARIABLE, settings["metadata"]["name"])
    assert reference["key"] in settings["data"]
    (image,) = read_yaml(KUBERNETES / "kustomization.yaml")["images"]
    assert container["image"] == image["name"]


def test_probes_ask_for_the_model_and_leave_time_to_start() -> None:
    (container,) = pod()["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    probes = [container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    for probe in probes:
        assert probe["httpGet"]["path"] == READY
        assert ports[probe["httpGet"]["port"]] == DEFAULT_PORTS.http
    assert probes[0]["periodSeconds"] * probes[0]["failureThreshold"] >= 600, "as long as `wisp-server up` waits"
    assert probes[2]["failureThreshold"] * probes[2]["periodSeconds"] > probes[1]["periodSeconds"] * 2
    exit_s = next(int(option.partition("=")[2]) for option in TRITON_OPTIONS if "exit-timeout" in option)
    assert pod()["terminationGracePeriodSeconds"] > exit_s + 5


def test_pods_have_few_rights() -> None:
    (container,) = pod()["containers"]
    rights = container["securityContext"]
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["capabilities"] == {"drop": ["ALL"]}
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable >= {dockerfile().envs["WISP_HOME"], "/dev/shm", "/tmp"}


def test_the_autoscaler_asks_for_metrics_that_are_exposed() -> None:
    spec = resources()["HorizontalPodAutoscaler"]["spec"]
    assert spec["scaleTargetRef"]["name"] == resources()["Deployment"]["metadata"]["name"]
    assert "replicas" not in resources()["Deployment"]["spec"], "the autoscaler owns the number"
    asked = {metric["pods"]["metric"]["name"] for metric in spec["metrics"]}
    rules = read_yaml(KUBERNETES / "prometheus-adapter.yaml")["rules"]["custom"]
    assert asked == {rule["name"]["as"] for rule in rules}
    exposed = {family.name for family in Telemetry().families()}
    for rule in rules:
        (series,) = re.findall(r"^(\w+)\{", rule["seriesQuery"])
        assert series in exposed
        assert re.fullmatch(rule["name"]["matches"], series)
    annotations = resources()["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(DEFAULT_PORTS.metrics)


# -- settings -------------------------------------------------------------------------------------------------------


def settings_texts() -> dict[str, str]:
    """WISP_SERVER_CONFIG wherever it is set."""
    return {
        "kubernetes": resources()["ConfigMap"]["data"][SETTINGS_VARIABLE],
        "compose": read_yaml(DEPLOY / "compose.yaml")["services"]["server"]["environment"][SETTINGS_VARIABLE],
    }


@pytest.mark.parametrize("where", ["kubernetes", "compose"])
def test_settings_are_known_to_the_server(where: str) -> None:
    settings = json.loads(settings_texts()[where])
    target = settings.pop("target")
    assert checked_settings(settings) == settings
    with pytest.raises(ConfigError, match="unknown"):
        checked_settings(settings | {"kv_token": 1})
    volumes = read_yaml(DEPLOY / "compose.yaml")["services"]["server"]["volumes"]
    mounts = {
        "kubernetes": [mount["mountPath"] for mount in pod()["containers"][0]["volumeMounts"]],
        "compose": [volume.split(":")[-2] for volume in volumes if volume.endswith(":ro")],
    }
    assert any(target.startswith(mount) for mount in mounts[where]), f"nothing is mounted at {target}"


# -- the image ------------------------------------------------------------------------------------------------------


@functools.cache
def dockerfile() -> DockerfileParser:
    return DockerfileParser(
        fileobj=(DEPLOY / "Dockerfile").open("rb+"), build_args={"TRITON_IMAGE": "tritonserver:25.04-py3"}
    )


def instructions(name: str) -> list[str]:
    return [step["value"] for step in dockerfile().structure if step["instruction"] == name]


def test_the_image_is_made_of_what_is_there() -> None:
    assert instructions("ARG")[0] == "TRITON_IMAGE", "no default: who builds names the image"
    assert set(instructions("FROM")) == {"${TRITON_IMAGE} AS plugin", "${TRITON_IMAGE}"}
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [source for value in instructions("COPY") if "--from" not in value for source in value.split()[:-1]]
    assert {"wisp_plugin", "triton_models", "model_repository"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in kept, f"{source} is left out by Dockerfile.dockerignore"
    assert {line.split("/")[0] for line in kept} == {source.split("/")[0] for source in sources}
    assert any("batchstrategy.so" in value for value in instructions("COPY"))
    assert instructions("USER") == ["1000:1000"]
    assert pod()["securityContext"]["runAsUser"] == 1000


def test_the_container_starts_what_the_launcher_starts() -> None:
    (command,) = [json.loads(value) for value in instructions("CMD")]
    assert command[0] == "tritonserver"
    assert set(TRITON_OPTIONS) <= set(command)
    loaded = {option.partition("=")[2] for option in command if option.startswith("--load-model=")}
    assert loaded == set(default_models(MODEL_REPOSITORY, "/models/target"))
    known = {*TRITON_OPTIONS, "--model-repository=/opt/wisp/model_repository"}
    assert {option for option in command[1:] if not option.startswith("--load-model=")} == known
    assert "model_repository model_repository" in instructions("COPY")
    assert instructions("WORKDIR") == ["/opt/wisp"]
    envs = dockerfile().envs
    assert {name: envs[name] for name in OPENMP} == OPENMP
    assert {int(port) for port in instructions("EXPOSE")[0].split()} == PORTS
    assert READY in instructions("HEALTHCHECK")[0]


def test_no_file_names_a_registry() -> None:
    """Where images come from is the operator's choice: the first part of a name is no host."""
    compose = [read_yaml(path) for path in DEPLOY.glob("compose*.yaml")]
    images = [service["image"] for project in compose for service in project["services"].values() if "image" in service]
    for image in [*images, pod()["containers"][0]["image"]]:
        first, _, rest = image.partition("/")
        assert not rest or not re.search(r"[.:]", first), image


# -- compose and nginx ----------------------------------------------------------------------------------------------


def test_compose_files_are_valid() -> None:
    for path in DEPLOY.glob("compose*.yaml"):
        assert compose_faults(read_yaml(path)) == [], path.name
    project = read_yaml(DEPLOY / "compose.yaml")
    server = project["services"]["server"]
    build = server["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()
    assert set(build["args"]) <= set(arg.partition("=")[0] for arg in instructions("ARG"))
    assert {int(port.split(":")[-1]) for port in server["ports"]} == PORTS
    named = {volume.split(":")[0] for volume in server["volumes"]} - {v for v in server["volumes"] if v.startswith("$")}
    assert {name for name in named if not name.startswith("$")} == set(project["volumes"])
    assert set(read_yaml(DEPLOY / "compose.gpu.yaml")["services"]) == {"server"}


def test_prometheus_reads_the_server_of_compose() -> None:
    (job,) = read_yaml(DEPLOY / "prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{DEFAULT_PORTS.metrics}"]}]
    mounted = read_yaml(DEPLOY / "compose.yaml")["services"]["prometheus"]["volumes"][0].split(":")[0]
    assert (DEPLOY / mounted).is_file()


def test_the_proxy_passes_calls_that_exist() -> None:
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    (service, methods) = re.search(r"\^/([\w\\.]+)/\(([\w|]+)\)\$", text).groups()  # type: ignore[union-attr]
    described = service_pb2.DESCRIPTOR.services_by_name[service.split(".")[-1]]
    assert described.full_name == service.replace("\\.", ".")
    assert set(methods.split("|")) <= {method.name for method in described.methods}
    assert f"grpc://127.0.0.1:{DEFAULT_PORTS.grpc};" in text
