"""The files in deploy/, judged by the schemas and linters of those who read them."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml
from support import ROOT
from support.needs import need
from support.processes import assert_user_error, environment, run

DEPLOY = ROOT / "deploy"


def manifests():
    return {found["kind"]: found for found in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def test_the_manifests_are_kubernetes(tmp_path):
    validate = pytest.importorskip("kubernetes_validate")
    kinds = manifests()
    assert kinds.keys() == {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    for found in kinds.values():
        validate.validate(found, validate.latest_version(), strict=True)
    kinds["Deployment"]["spec"]["replica"] = 3
    with pytest.raises(Exception, match="replica"):
        validate.validate(kinds["Deployment"], validate.latest_version(), strict=True)


def test_the_manifests_belong_together():
    kinds = manifests()
    deployment = kinds["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels == kinds["Service"]["spec"]["selector"]
    assert kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    scaled = kinds["HorizontalPodAutoscaler"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == kinds["Deployment"]["metadata"]["name"]
    pod = deployment["template"]["spec"]
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    drain = float(container["args"][container["args"].index("--drain-seconds") + 1])
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert drain + pause < pod["terminationGracePeriodSeconds"]
    [metric] = scaled["metrics"]
    [rule] = yaml.safe_load((DEPLOY / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]


def test_flags_and_metrics_are_the_servers():
    need("prometheus_client", "aiohttp")
    from cqil_trt.commands.serve import parser
    from cqil_trt.serving.metrics import Metrics

    [container] = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert parser().parse_args(container["args"]).model_name == ["mine"]
    known = {f"{family.name}" for family in Metrics("m").registry.collect()}
    used = set(re.findall(r"(?:vllm|cqil):\w+", (DEPLOY / "prometheus-adapter.yaml").read_text()))
    assert used and used <= known


def test_the_compose_file_is_one(tmp_path):
    need("check_jsonschema")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, DEPLOY / "compose.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    compose["services"]["server"]["shm-size"] = "1gb"
    (tmp_path / "wrong.json").write_text(json.dumps(compose))
    assert subprocess.run([*check, tmp_path / "wrong.json"], capture_output=True).returncode == 1
    for service in compose["services"].values():
        for volume in service["volumes"]:
            if isinstance(volume, str):
                assert (DEPLOY / volume.split(":")[0]).is_file()
    for content in compose["configs"].values():
        assert yaml.safe_load(content["content"])["apiVersion"] == 1


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not on the PATH")
def test_the_dockerfile_passes_its_linter(tmp_path):
    done = subprocess.run(["hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text((DEPLOY / "Dockerfile").read_text() + "FROM nothing:latest AS cpu\n")
    assert subprocess.run(["hadolint", tmp_path / "Dockerfile"], capture_output=True).returncode != 0


def test_the_dockerfile_copies_what_the_wheel_needs():
    """What .dockerignore lets in: everything that pyproject.toml and the build script name."""
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")}
    assert all((ROOT / path).exists() for path in allowed)
    text = (ROOT / "pyproject.toml").read_text()
    included = re.findall(r'^"(\S+)" = "cqil_trt/_', text, re.M)
    assert {*included, "README.md", "cqil_trt", "hatch_build.py", "pyproject.toml"} <= allowed
    for copied in re.findall(r"^COPY .*?(deploy/\S+) ", (DEPLOY / "Dockerfile").read_text(), re.M):
        assert copied in allowed


@pytest.mark.slow
def test_ray_reads_the_config_file():
    need("ray", "aiohttp")
    from ray.serve.schema import ServeDeploySchema

    from cqil_trt.deploy.ray_serve import Options

    config = ServeDeploySchema.model_validate(yaml.safe_load((DEPLOY / "ray-serve.yaml").read_text()))
    [application] = config.applications
    assert Options(**application.args).replicas == 2


@pytest.mark.slow
def test_the_entry_point_starts_as_many_ranks_as_the_engine_has(tmp_path):
    need("uvicorn", "starlette", "pydantic", "prometheus_client", "llguidance")
    from support.chat_models import make_chat_model

    import cqil_trt

    model = make_chat_model(tmp_path / "model")
    engine = cqil_trt.build(model=model, p=2, output=tmp_path / "engine", probes="never").path
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "cqil-serve").write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/runtime/serve.py "$@"\n')
    # No link, which would leave the virtual environment.
    (tools / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {**environment(), "CQIL_ENGINE": str(engine), "CQIL_PORT": "0", "PYTHONPATH": str(ROOT)}
    env["PATH"] = f"{tools}:{env['PATH']}"
    command = [DEPLOY / "entrypoint.sh", "--device", "cpu", "--pid-file", tmp_path / "pid"]
    server = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        port = next(line.rsplit(":", 1)[1].strip() for line in server.stdout if "serving at http://0.0.0.0:" in line)
        health = [sys.executable, DEPLOY / "health.py"]
        env |= {"CQIL_PORT": port, "http_proxy": "http://127.0.0.1:9"}  # a proxy that is not for this
        assert subprocess.run(health, env=env).returncode == 0
        server.send_signal(signal.SIGTERM)  # as `docker stop` does
        assert "stopped: all ranks hold identical bits" in server.stdout.read()
        assert server.wait(120) == 0
    finally:
        server.kill()
    with socket.socket() as nobody:  # as when the server has ended, and nobody else can have its port
        nobody.bind(("127.0.0.1", 0))
        port = env["CQIL_PORT"] = str(nobody.getsockname()[1])
        ended = subprocess.run(health, env=env, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith(f"port {port}: ") and ended.stderr.count("\n") == 1
    wrong = run(sys.executable, "-m", "cqil_trt.deploy.ranks", tmp_path)
    assert_user_error(wrong, "not an engine directory")


def container_tool():
    """docker or podman, whichever holds the base image; else the test is skipped."""
    base = re.search(r"^FROM (\S+) AS cpu$", (DEPLOY / "Dockerfile").read_text(), re.M)[1]
    for tool in filter(shutil.which, ("docker", "podman")):
        if subprocess.run([tool, "image", "inspect", base], capture_output=True, timeout=60).returncode == 0:
            return tool
    pytest.skip(f"needs docker or podman, with the image {base} pulled")


@pytest.mark.slow
def test_the_image_for_cpus_serves_as_the_manifests_run_it(tmp_path):
    """The build fetches packages. PIP_INDEX_URL and TORCH_INDEX name mirrors for it."""
    tool = container_tool()
    need("openai")
    import openai
    from support.chat_models import make_chat_model

    import cqil_trt

    def call(*arguments):
        env = {**os.environ, "BUILDAH_FORMAT": "docker"}  # podman's own has no HEALTHCHECK
        done = subprocess.run([tool, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout.strip()

    def ready(address):
        with contextlib.suppress(OSError):  # an answer of 503 is one
            return urllib.request.urlopen(f"http://{address}/ready", timeout=5).status == 200

    mirrors = ["--build-arg", "PIP_INDEX_URL", "--build-arg", "TORCH_INDEX"]
    fresh = ["--no-cache"] if tool == "podman" else []  # it keeps a step that mounts a stage which has changed
    call("build", *fresh, "--file", "deploy/Dockerfile", "--target", "cpu", "--tag", "cqil-trt:test", *mirrors, ".")
    engine = cqil_trt.build(
        model=make_chat_model(tmp_path / "model"), p=2, output=tmp_path / "engine", probes="never"
    ).path
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    context = pod["containers"][0]["securityContext"]
    assert context == dict(allowPrivilegeEscalation=False, readOnlyRootFilesystem=True, capabilities={"drop": ["ALL"]})
    security = ["--security-opt", "no-new-privileges", "--read-only", "--cap-drop", "ALL"]
    # Where there is no systemd, podman starts nothing that has a HEALTHCHECK.
    place = ["--tmpfs", "/tmp", "--volume", f"{engine}:/engine:ro", "--publish", "127.0.0.1::8000", "--no-healthcheck"]
    container = call("run", "--detach", *security, *place, "cqil-trt:test", "--model-name", "mine")
    try:
        address = call("port", container, "8000")
        deadline = time.monotonic() + 120
        while not ready(address):
            assert time.monotonic() < deadline, call("logs", container)
            time.sleep(0.5)
        assert call("exec", container, "id", "-u") == str(pod["securityContext"]["runAsUser"])
        call("exec", container, "cqil-health")
        client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none")
        messages = [{"role": "user", "content": "hello"}]
        answer = client.chat.completions.create(model="mine", messages=messages, max_tokens=4)
        assert 1 <= answer.usage.completion_tokens <= 4
        call("stop", "-t", "60", container)
        assert call("wait", container) == "0"
    finally:
        call("rm", "--force", container)
