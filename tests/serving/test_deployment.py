"""The manifests are valid Kubernetes, agree with one another, and the router keeps conversations where their beginning is cached."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from relseek_resources.serving.vectors import Configuration
from tests.serving.embedded import HELLO, EmbeddedServer, serving

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
VERSIONS = ("1.29", "1.37")
NEEDS_NGINX = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed; `make test` installs it")


def manifests() -> list[tuple[str, dict[str, Any]]]:
    resources = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    files = [KUBERNETES / name for name in (*resources, "secret.example.yaml")]
    return [(file.name, one) for file in files for one in yaml.safe_load_all(file.read_text())]


def of_kind(kind: str, name: str) -> dict[str, Any]:
    [found] = [one for _, one in manifests() if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


@contextlib.contextmanager
def everything_is_here(status: int = 200, body: bytes = b"") -> Iterator[tuple[int, list[str]]]:
    """A server that answers every path alike, and the requests that reached it."""
    came: list[str] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            came.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], came
        server.shutdown()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_what_kubernetes_takes(version: str) -> None:
    kinds = {one["kind"] for _, one in manifests()}
    assert {"StatefulSet", "Deployment", "Service", "PodDisruptionBudget", "Secret", "PersistentVolumeClaim", "NetworkPolicy"} <= kinds
    for _, one in manifests():
        kubernetes_validate.validate(one, version, strict=True)
    misspelt = of_kind("StatefulSet", "vllm")
    misspelt["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(misspelt, version, strict=True)


def test_manifests_select_mount_and_refer_to_what_there_is() -> None:
    made = {(one["kind"], one["metadata"]["name"]) for _, one in manifests()}
    generated = {("ConfigMap", one["name"]) for one in yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["configMapGenerator"]}
    workloads = [of_kind("StatefulSet", "vllm"), of_kind("Deployment", "router")]
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in workloads]
    for one in workloads:
        pod = one["spec"]["template"]["spec"]
        assert one["spec"]["selector"]["matchLabels"] == one["spec"]["template"]["metadata"]["labels"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["name"] for container in (*pod["containers"], *pod.get("initContainers", ())) for mount in container["volumeMounts"]}
        assert mounted == volumes.keys()
        for volume in volumes.values():
            assert "configMap" not in volume or ("ConfigMap", volume["configMap"]["name"]) in generated
            assert "persistentVolumeClaim" not in volume or ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in made
        for container in pod["containers"]:
            assert re.fullmatch(r"[\w/.-]+:[\w.-]*\d[\w.-]*", container["image"]), "a pinned version"
            secrets = {source["secretRef"]["name"] for source in container.get("envFrom", ())}
            assert all(("Secret", name) in made for name in secrets)
    for _, one in manifests():
        if one["kind"] in ("Service", "PodDisruptionBudget"):
            selector = one["spec"]["selector"]
            assert selector.get("matchLabels", selector) in labels, one["metadata"]["name"]


def test_the_plugin_reads_the_configuration_and_workers_are_as_many_as_gpus() -> None:
    steering = json.loads((KUBERNETES / "steering.json").read_text())["relseek"]
    configuration = Configuration.from_json(steering)
    [vllm] = of_kind("StatefulSet", "vllm")["spec"]["template"]["spec"]["containers"]
    assert configuration.folder is not None and configuration.default is not None
    assert str(configuration.folder) in {mount["mountPath"] for mount in vllm["volumeMounts"]}
    command = " ".join(vllm["args"])
    assert re.search(r"--tensor-parallel-size (\d+)", command)[1] == vllm["resources"]["limits"]["nvidia.com/gpu"]  # type: ignore[index]
    environment = {one["name"]: one["value"] for one in vllm["env"]}
    assert environment["VLLM_PLUGINS"] == "relseek" and environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_a_busy_replica_is_not_taken_for_one_that_does_not_steer() -> None:
    """Whether it steers is asked at the start and now and then; readiness, by which requests are sent elsewhere, costs the model nothing."""
    pod = of_kind("StatefulSet", "vllm")["spec"]["template"]["spec"]
    [vllm] = pod["containers"]
    assert vllm["readinessProbe"]["httpGet"]["path"] == "/health"
    script = "/srv/steering/steers.py"
    assert vllm["startupProbe"]["exec"]["command"] == ["python3", script]
    assert vllm["livenessProbe"]["exec"]["command"] == ["python3", script, "--patient"] and vllm["livenessProbe"]["periodSeconds"] >= 300
    [patience] = re.findall(r"timeout=(\d+)", (KUBERNETES / "steers.py").read_text())
    assert all(vllm[probe]["timeoutSeconds"] > int(patience) for probe in ("startupProbe", "livenessProbe"))
    [steering] = [one for one in yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["configMapGenerator"] if one["name"] == "steering"]
    assert (
        steering["files"] == ["steering.json", "steers.py"]
        and {"name": "steering", "mountPath": "/srv/steering", "readOnly": True} in vllm["volumeMounts"]
    )


def test_replies_under_way_are_finished_before_a_replica_is_killed() -> None:
    pod = of_kind("StatefulSet", "vllm")["spec"]["template"]["spec"]
    [vllm] = pod["containers"]
    [drain] = re.findall(r"--shutdown-timeout (\d+)", " ".join(vllm["args"]))  # vLLM's own default is to abort them
    assert int(drain) >= 60
    assert int(vllm["lifecycle"]["preStop"]["exec"]["command"][1]) + int(drain) < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("status", "body", "strict", "patient"),
    [
        (200, b'{"live": true}', 0, 0),
        (503, b'{"live": false}', 1, 1),
        (503, b"overloaded", 1, 0),
        (429, b"{}", 1, 0),
        (500, b'{"error": {"message": "m"}}', 1, 0),
        (None, b"", 1, 0),
    ],
)
def test_the_probe_fails_by_a_measurement_and_when_it_is_patient_by_nothing_else(status: int | None, body: bytes, strict: int, patient: int) -> None:
    with everything_is_here(status or 200, body) as (port, came):
        address = f"http://127.0.0.1:{port if status else 9}"
        environment = {**os.environ, "RELSEEK_ADDRESS": address, "VLLM_API_KEY": "K"}
        command = [sys.executable, str(KUBERNETES / "steers.py")]
        codes = [subprocess.run([*command, *more], env=environment, check=False).returncode for more in ([], ["--patient"])]
    assert codes == [strict, patient]
    assert came == (["GET /v1/relseek/health"] * 2 if status else [])


def test_whoever_fills_a_volume_can_write_to_it() -> None:
    """A claim for reading alone is met with an empty volume, which then nobody can fill."""
    claims = [one["spec"] for _, one in manifests() if one["kind"] == "PersistentVolumeClaim"]
    assert claims and all(one["accessModes"] == ["ReadWriteMany"] for one in claims)
    pod = of_kind("StatefulSet", "vllm")["spec"]["template"]["spec"]
    assert all(
        mount["readOnly"] for one in (*pod["containers"], *pod["initContainers"]) for mount in one["volumeMounts"] if mount["name"] == "vectors"
    )


def test_the_routers_ring_names_every_replica() -> None:
    spec = of_kind("StatefulSet", "vllm")["spec"]
    there = re.findall(r"server (vllm-\d+)\.vllm\.relseek\.svc", (KUBERNETES / "nginx.conf").read_text())
    assert there == [f"vllm-{number}" for number in range(spec["replicas"])] and spec["serviceName"] == "vllm"


def test_keyless_servers_of_one_machine_are_not_offered_to_others() -> None:
    """The router's requests come from this machine, so that a server without keys answers them whoever sent them."""
    listens = {name: re.findall(r"listen (\S+);", (DEPLOY / name).read_text()) for name in ("two_replicas.conf", "kubernetes/nginx.conf")}
    assert listens == {"two_replicas.conf": ["127.0.0.1:8080"], "kubernetes/nginx.conf": ["8080"]}
    assert not any(
        "listen" in line for name in ("router.conf", "routes.conf") for line in (KUBERNETES / name).read_text().splitlines() if "#" not in line
    )


def test_the_router_of_one_machine_starts_without_root() -> None:
    """nginx makes a folder for each module that is built in, used or not, and only root may make them where they belong by default."""
    text = (DEPLOY / "two_replicas.conf").read_text()
    folders = re.findall(r"^ *(\w+)_temp_path (/tmp/[\w-]+);", text, re.MULTILINE)
    assert {module for module, _ in folders} == {"client_body", "proxy", "fastcgi", "uwsgi", "scgi"}
    assert len({folder for _, folder in folders}) == 5


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md", "docs/deployment.md"])
def test_no_documented_server_is_open_to_others_without_a_key(page: str) -> None:
    """vLLM by itself listens on every address."""
    blocks = re.findall(r"(?:^    .*\n)+", (DEPLOY.parent / page).read_text(encoding="utf-8"), re.MULTILINE)
    starts = [block for block in blocks if "vllm.entrypoints.openai.api_server" in block]
    assert len(starts) == (page != "README.md")
    assert all("--host 127.0.0.1" in block for block in starts)


def test_every_file_that_nginx_includes_is_in_the_configmap() -> None:
    [router] = [one for one in yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["configMapGenerator"] if one["name"] == "router"]
    included = re.findall(r"include /etc/nginx/relseek/(\S+);", (KUBERNETES / "nginx.conf").read_text())
    assert sorted(router["files"]) == sorted(["nginx.conf", *included]) and all((KUBERNETES / name).is_file() for name in router["files"])


# --- the router, with two servers of this machine -----------------------------------------------------------------------


@contextlib.contextmanager
def router(folder: Path, ports: tuple[int, int]) -> Iterator[str]:
    """nginx with deploy/two_replicas.conf, its ports replaced by the test's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "kubernetes").mkdir()
    for name in ("router.conf", "routes.conf"):
        shutil.copy(KUBERNETES / name, folder / "kubernetes")
    text = (DEPLOY / "two_replicas.conf").read_text().replace("/tmp/relseek-router", str(folder / "router"))
    assert text.count("listen 127.0.0.1:8080;") == 1
    text = text.replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    for written, mine in zip(("8001", "8002"), ports, strict=True):
        text = text.replace(f"127.0.0.1:{written}", f"127.0.0.1:{mine}")
    (folder / "two_replicas.conf").write_text(text)
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", "two_replicas.conf"], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                assert urllib.request.urlopen(f"{url}/router").read() == b"ok\n"
                break
            assert process.poll() is None and time.monotonic() < deadline, "nginx did not start"
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def replica(url: str, session: str) -> str:
    """The name of the replica that answers a session."""
    asked = urllib.request.Request(f"{url}/v1/models", headers={"x-session-id": session})
    return str(json.loads(urllib.request.urlopen(asked, timeout=30).read())["data"][0]["id"])


@NEEDS_NGINX
def test_a_conversation_stays_with_its_replica_until_that_one_is_gone(random_causal_lm: Any, byte_tokenizer: Any, tmp_path: Path) -> None:
    from relseek_resources.models import SteeredModel

    def started(stack: contextlib.ExitStack, name: str) -> EmbeddedServer:
        (tmp_path / name).mkdir()
        model = SteeredModel(random_causal_lm("llama"), byte_tokenizer)
        return stack.enter_context(serving(model, tmp_path / name, name=name))

    sessions = [f"conversation-{number}" for number in range(40)]
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        one, two = started(first, "one"), started(second, "two")
        with router(tmp_path, (one.port, two.port)) as url:
            before = {session: replica(url, session) for session in sessions}
            assert {session: replica(url, session) for session in reversed(sessions)} == before
            share = list(before.values()).count("one") / len(sessions)
            assert 0.2 < share < 0.8, "both have their part"

            # a streamed, steered turn through the router, from the replica that the session belongs to
            session = next(session for session in sessions if before[session] == "two")
            body = {"model": "two", "messages": HELLO, "max_tokens": 8, "temperature": 0, "custom": {"steer_multiplier": 1.0}}
            headers = {"content-type": "application/json", "x-session-id": session}
            asked = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps({**body, "stream": True}).encode(), headers)
            events = [line for line in urllib.request.urlopen(asked, timeout=30).read().splitlines() if line]
            assert events[-1] == b"data: [DONE]" and len(events) > 3
            _, own, _ = two.ask("/v1/chat/completions", body)
            deltas = [json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
            assert "".join(deltas) == own["choices"][0]["message"]["content"]

            first.close()
            after = {session: replica(url, session) for session in sessions}
            assert set(after.values()) == {"two"}, "nobody is refused, and those of the other stay where they were"


@NEEDS_NGINX
def test_vectors_are_not_registered_with_one_replica_behind_the_routers_back(random_causal_lm: Any, byte_tokenizer: Any, tmp_path: Path) -> None:
    from relseek_resources.models import SteeredModel

    with serving(SteeredModel(random_causal_lm("llama"), byte_tokenizer), tmp_path) as only, router(tmp_path, (only.port, only.port)) as url:
        asked = urllib.request.Request(f"{url}/v1/relseek/vectors", b"{}", {"content-type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(asked, timeout=30)
        assert "warm" in urllib.request.urlopen(f"{url}/v1/relseek/vectors", timeout=30).read().decode()


@NEEDS_NGINX
def test_the_router_passes_what_a_key_guards_and_nothing_else(tmp_path: Path) -> None:
    closed = ["/", "/invocations", "/scale_elastic_ep", "/tokenize", "/metrics", "/load", "/v1", "/v2/x", "/docs", "//invocations"]
    closed += ["/v1/../invocations", "/v1/%2e%2e/invocations", "/v1/..%2finvocations", "/v1/./../invocations", "/V1/models", "/inference/v1/generate"]
    opened = ["/v1/models", "/v1/chat/completions", "/v1/relseek/health"]
    with everything_is_here() as (port, came), router(tmp_path, (port, port)) as url:
        address = urllib.parse.urlsplit(url).netloc

        def status(method: str, path: str) -> int:
            with contextlib.closing(http.client.HTTPConnection(address, timeout=30)) as connection:
                connection.request(method, path, b"{}" if method == "POST" else None)  # as it is written: urllib would tidy it
                return connection.getresponse().status

        for method in ("GET", "POST"):
            assert {path: status(method, path) for path in closed if status(method, path) not in (301, 404)} == {}
        assert came == []
        assert [status(method, path) for method in ("GET", "POST") for path in opened] == [200] * 6 == [200] * len(came)
