"""The manifest of the router and the Helm values: what they run, run here."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import tomllib
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import typer
import yaml
from aiohttp import web
from manifests import (
    DEPLOY,
    DOCKERFILE,
    RELEASE,
    ROUTER,
    VALUES,
    environment,
    manifest,
    model_spec,
    router_pod,
    values,
)

from vllm_saga.cli import app
from vllm_saga.config import load_config
from vllm_saga.router.app import Router
from vllm_saga.router.backends import parse_list
from vllm_saga.router.settings import RouterSettings

ROOT = DEPLOY.parent


def router_arguments() -> list[str]:
    """What the router's container is started with: the image's entry point, then the pod's."""
    entry = re.findall(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE.read_text(), re.MULTILINE)[-1]
    (container,) = router_pod()["spec"]["containers"]
    return [*yaml.safe_load(entry), *container["args"]]


def sidecar() -> dict:
    (container,) = router_pod()["spec"]["initContainers"]
    return container


@asynccontextmanager
async def engines_list(folder: Path, port: int, addresses: str):
    """The sidecar's own command over a DNS that has `addresses`; gives its list's file."""
    stub = folder / "bin"
    stub.mkdir()
    (folder / "dns").write_text(addresses)
    (stub / "getent").write_text(f"#!/bin/sh\ncat {folder}/dns\n")
    (stub / "getent").chmod(0o755)
    listed = folder / "list"
    container = sidecar()
    process = await asyncio.create_subprocess_exec(
        *container["command"], *container["args"],
        env=environment(container) | {
            "PATH": f"{stub}:{os.environ['PATH']}", "LIST": str(listed), "PORT": str(port),
        },
    )  # fmt: skip
    try:
        async with asyncio.timeout(10):
            while not listed.exists():
                await asyncio.sleep(0.02)
        yield listed
    finally:
        process.terminate()
        await process.wait()


async def _healthy(_: web.Request) -> web.Response:
    return web.Response()


# -- the router -------------------------------------------------------------------------------


def test_the_router_takes_its_arguments():
    program, command, *arguments = router_arguments()
    assert program == "vllm-saga"
    typer.main.get_command(app).commands[command].make_context(command, arguments)


async def test_the_sidecar_lists_each_engine_once_and_keeps_the_list_while_dns_has_none(tmp_path):
    dns = "10.0.0.2 STREAM saga-engines\n10.0.0.2 DGRAM\n10.0.0.1 STREAM\n10.0.0.1 RAW\n"
    async with engines_list(tmp_path, 8000, dns) as listed:
        urls = [address.url for address in parse_list(listed.read_text())]
        assert urls == ["http://10.0.0.1:8000", "http://10.0.0.2:8000"]
        written = listed.stat()
        (tmp_path / "dns").write_text("")
        await asyncio.sleep(2.5)
        assert listed.stat() == written


async def test_an_engine_that_dns_finds_serves_and_probes_are_answered(tmp_path):
    engine = web.Application()
    engine.router.add_get("/health", _healthy)
    runner = web.AppRunner(engine)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    pod = router_pod()
    (container,) = pod["spec"]["containers"]
    paths = [container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")]
    paths.append(pod["metadata"]["annotations"]["prometheus.io/path"])
    try:
        async with (
            engines_list(tmp_path, port, "127.0.0.1 STREAM saga-engines\n") as listed,
            Router(RouterSettings(port=0, health_interval=0.1), backends_file=listed) as router,
            aiohttp.ClientSession(f"http://127.0.0.1:{router.port}") as http,
        ):
            for path in paths:
                async with asyncio.timeout(10):
                    while (await http.get(path)).status != 200:
                        await asyncio.sleep(0.05)
    finally:
        await runner.cleanup()


def test_services_select_the_router_and_the_chart_s_engines():
    labels = router_pod()["metadata"]["labels"]
    for kind in ("Service", "PodDisruptionBudget", "Deployment"):
        selector = manifest(kind, "saga-router")["spec"]["selector"]
        assert selector.get("matchLabels", selector).items() <= labels.items()
    engines = manifest("Service", "saga-engines")["spec"]
    assert engines["clusterIP"] == "None"
    assert engines["selector"] == {"model": model_spec()["name"], "helm-release-name": RELEASE}
    assert environment(sidecar())["ENGINES"] == "saga-engines"


def test_the_grace_period_outlives_calls_in_flight():
    spec = router_pod()["spec"]
    (container,) = spec["containers"]
    stopping = next(a for a in container["args"] if a.startswith("--shutdown-timeout-secs="))
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] >= int(stopping.partition("=")[2]) + before


# -- the engines ------------------------------------------------------------------------------


def test_vllm_takes_the_engines_arguments():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = model_spec()["vllmConfig"]["extraArgs"]
    read = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    assert read.scheduler_cls == "saga"
    assert read.middleware == ["vllm_saga.server.SessionHeaders"]


def test_the_chart_leaves_prefix_caching_on():
    assert model_spec()["vllmConfig"]["enablePrefixCaching"] is True


def test_the_engines_read_a_valid_config_where_it_is_mounted(tmp_path, monkeypatch):
    spec = model_spec()
    path = Path(environment(spec)["SAGA_CONFIG"])
    (volume,), (mount,) = spec["extraVolumes"], spec["extraVolumeMounts"]
    assert (mount["name"], Path(mount["mountPath"])) == (volume["name"], path.parent)
    text = manifest("ConfigMap", volume["configMap"]["name"])["data"][path.name]
    (tmp_path / path.name).write_text(text)
    monkeypatch.setenv("SAGA_CONFIG", str(tmp_path / path.name))
    assert load_config(None).max_hold_s == yaml.safe_load(text)["max_hold_s"]


def test_the_chart_s_own_router_is_off():
    assert values()["routerSpec"]["enableRouter"] is False


# -- images -----------------------------------------------------------------------------------


def test_the_images_are_built_from_what_docker_is_sent():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sent = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split()
    for name in ("pyproject.toml", project["readme"], *project["license-files"], "vllm_saga"):
        assert f"!{name}" in sent
        assert re.search(rf"^COPY .*\b{re.escape(name)}\b", DOCKERFILE.read_text(), re.MULTILINE)


def test_the_router_s_image_gets_what_the_router_imports(tmp_path):
    """Neither vLLM nor torch is there."""
    script = (
        "import sys, importlib.abc\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('vllm', 'torch', 'transformers', 'fastapi', 'ray'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import vllm_saga.cli, vllm_saga.router.app, vllm_saga.router.command\n"
    )
    python = ROOT / ".venv" / "bin" / "python"
    subprocess.run([python, "-c", script], check=True, cwd=tmp_path)


# -- schemas ----------------------------------------------------------------------------------


def _needs(name: str) -> str:
    path = os.environ.get(name)
    if not path:
        pytest.skip(f"{name} is not set")
    return path


@pytest.mark.parametrize("version", ["1.29", "1.34"])
def test_kubernetes_knows_every_field_of_the_manifest(version):
    """SAGA_TEST_KUBERNETES=…/kubernetes-validate (of PyPI's package of that name)."""
    validate = _needs("SAGA_TEST_KUBERNETES")
    subprocess.run([validate, "--strict", "-k", version, ROUTER], check=True)


def test_the_chart_makes_engines_of_the_values(tmp_path):
    """SAGA_TEST_HELM=…/helm, SAGA_TEST_CHART=…/production-stack/helm; SAGA_TEST_KUBERNETES, too."""
    helm, chart = _needs("SAGA_TEST_HELM"), _needs("SAGA_TEST_CHART")
    rendered = tmp_path / "rendered.yaml"
    with rendered.open("w") as out:
        subprocess.run([helm, "template", RELEASE, chart, "-f", VALUES], check=True, stdout=out)
    objects = [o for o in yaml.safe_load_all(rendered.read_text()) if o]
    (pod,) = (o["spec"]["template"] for o in objects if o["kind"] == "Deployment")
    engines = manifest("Service", "saga-engines")["spec"]["selector"]
    assert engines.items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    command = container["command"]
    assert command[command.index("--scheduler-cls") + 1] == "saga"
    assert "--enable-prefix-caching" in command
    assert "--no-enable-prefix-caching" not in command
    assert environment(container)["VLLM_PLUGINS"] == "saga"
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted["saga"] == "/etc/saga"
    assert "saga-config" in [v.get("configMap", {}).get("name") for v in pod["spec"]["volumes"]]
    validate = _needs("SAGA_TEST_KUBERNETES")
    subprocess.run([validate, "--strict", rendered], check=True)
