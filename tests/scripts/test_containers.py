"""The files for containers and Kubernetes name what there is: files, extras, flags, routes."""

import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONTAINERFILES = sorted((ROOT / "containers").glob("Containerfile.*"))
REFERENCE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
SERVE = REFERENCE.partition("\n## minigpt4 serve\n")[2].partition("\n## ")[0]


def load_script():
    path = ROOT / "scripts" / "check_containers.py"
    spec = importlib.util.spec_from_file_location("check_containers", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()


def words_of(steps, keyword):
    return [word for step in steps if step.keyword == keyword for word in shlex.split(step.text)]


def assert_flags_exist(words):
    flags = [word for word in words if word.startswith("--")]
    assert flags
    for flag in flags:
        assert f"`{flag} " in SERVE or f"`{flag}`" in SERVE, flag


@pytest.fixture(params=CONTAINERFILES, ids=lambda path: path.name)
def steps(request):
    return SCRIPT.read_steps(request.param)


def test_there_is_one_for_each_target():
    assert [path.suffix for path in CONTAINERFILES] == [".cpu", ".cuda"]


def test_what_is_copied_is_there(steps):
    copied = [
        source
        for step in steps
        if step.keyword == "COPY" and "--from" not in step.text
        for source in step.without("--")[:-1]
    ]
    assert "src" in copied
    for source in copied:
        assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= set(copied)


def test_what_is_installed_is_what_is_tested(steps):
    runs = words_of(steps, "RUN")
    pinned = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    assert pinned in runs
    assert {"constraints.txt", "constraints-ray.txt"} <= set(runs)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    known = extras["project"]["optional-dependencies"]
    (default,) = [word.partition("=")[2] for word in words_of(steps, "ARG")]
    assert {default, "server", "ray"} <= set(known)


def test_it_starts_a_server_that_is_no_root_and_knows_its_flags(steps):
    given = {step.keyword: step.text for step in steps}
    entry, command = json.loads(given["ENTRYPOINT"]), json.loads(given["CMD"])
    assert entry[:4] == ["minigpt4", "serve", "--host", "0.0.0.0"]
    assert_flags_exist([*entry, *command])
    assert given["USER"] == "10001"
    assert given["STOPSIGNAL"] == "SIGTERM"


def test_the_steps_are_read_as_they_are_written(tmp_path):
    path = tmp_path / "Containerfile"
    path.write_text("# a comment\nFROM x AS y\nRUN a \\\n  && b\n\nCOPY --chown=1 c d ./\n")
    steps = SCRIPT.read_steps(path)
    assert [(step.keyword, shlex.split(step.text)) for step in steps] == [
        ("FROM", ["x", "AS", "y"]), ("RUN", ["a", "&&", "b"]),
        ("COPY", ["--chown=1", "c", "d", "./"]),
    ]  # fmt: skip
    assert steps[2].without("--") == ["c", "d", "./"]
    image = SCRIPT.Image(Path("/tmp/x"), {"EXTRAS": "ray"})
    assert image.within("/opt/a:/usr/opt /build") == "/tmp/x/opt/a:/usr/opt /tmp/x/build"
    image.do(SCRIPT.Step("ARG", "EXTRAS=server"))
    assert image.environment["EXTRAS"] == "ray"


@pytest.fixture(scope="module")
def manifest():
    text = (ROOT / "containers" / "kubernetes.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.fixture
def pod(manifest):
    return manifest["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
    (container,) = pod["containers"]
    return container


def test_probes_ask_routes_that_the_server_has(container):
    from fastapi.routing import APIRoute

    from minigpt4_runtime.server.app import create_app
    from minigpt4_runtime.server.settings import ServerConfig

    model = SimpleNamespace(tasks=(), adapters=(), engine_config=None, stats=lambda: None)
    app = create_app(model, ServerConfig(model_name="x"))
    routes = {route.path for route in app.routes if isinstance(route, APIRoute)}
    for probe in ("startupProbe", "livenessProbe"):
        # The one route that needs no key.
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    (asked,) = re.findall(
        r"http://127\.0\.0\.1:(\d+)(/\w+)", container["readinessProbe"]["exec"]["command"][2]
    )
    assert {"/health", asked[1]} <= routes
    assert asked == (str(container["ports"][0]["containerPort"]), "/ready")
    compile(container["readinessProbe"]["exec"]["command"][2], "probe", "exec")


def test_the_parts_of_the_manifest_fit_together(manifest, pod, container):
    deployment, service = manifest["Deployment"]["spec"], manifest["Service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels == service["selector"]
    assert manifest["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert service["ports"][0]["targetPort"] == container["ports"][0]["name"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
    arguments = container["args"]
    assert arguments[arguments.index("--model") + 1] == mounted["model"]
    assert arguments[arguments.index("--api-key-file") + 1].startswith(mounted["keys"] + "/")
    claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == manifest["PersistentVolumeClaim"]["metadata"]["name"]
    assert_flags_exist(arguments)
    # Time for preStop, and then for what --grace-seconds allows.
    grace = int(arguments[arguments.index("--grace-seconds") + 1])
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > grace + pause


@pytest.mark.ray  # kubernetes-validate is in that environment.
def test_the_manifest_keeps_to_the_schema(manifest):
    validate = pytest.importorskip("kubernetes_validate")
    for document in manifest.values():
        validate.validate(document, "1.32", strict=True)
    wrong = {**manifest["Service"], "spec": {"portz": []}}
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, "1.32", strict=True)
