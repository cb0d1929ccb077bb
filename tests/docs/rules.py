"""How each command of the docs is tested: exactly one rule for every command.

To document a new one, add a rule where its page is. `{name}` in a rule is one of `Places`
(conftest.py): files, folders and servers that are made for the tests.
"""

from __future__ import annotations

from ways import (
    AsksRouter,
    AsksServer,
    Exports,
    NeedsMore,
    Routes,
    Rule,
    RunElsewhere,
    Runs,
    Serves,
)

DEMO = RunElsewhere("tests/live_bench/test_live.py", '"-m", "benchmarks.live"', "benchmarks.live")
TEST = RunElsewhere(".ci/run", "scripts/test", "scripts/test")
CLIENTS = RunElsewhere("tests/clients/test_real_clients.py", '"scripts" / "clients"')
FUZZ = RunElsewhere("tests/fuzz/test_fuzz_command.py", '"run_fuzz.py"', "tests/fuzz/run_fuzz.py")
DOCKERFILE = "deploy/docker/Dockerfile"
ROUTER_YAML = "deploy/kubernetes/router.yaml"
MANIFESTS = "tests/deploy/test_manifests.py"
HALF_POOL = {"benchmarks/results/half-pool.json": "{root}/benchmarks/results/half-pool.json"}
SMALL_SWEEP = "--workloads W1 --seeds 1 --sessions 3 --processes 1"

RULES = (
    # README, CONTRIBUTING
    Rule(r"pip install \.|pip install '\.\[\w+\]'", Runs(seconds=60)),
    Rule(r"scripts/demo( .*)?", DEMO),
    Rule(r"([A-Z_]+=1 )?scripts/test( .*)?", TEST),
    Rule(r"scripts/setup", RunElsewhere("scripts/test", "scripts/setup")),
    Rule(r"scripts/clients", CLIENTS),
    Rule(r"scripts/fuzz", FUZZ),
    Rule(
        r"scripts/check-dashboards",
        RunElsewhere("tests/deploy/test_dashboards_live.py", '"check-dashboards"'),
    ),
    Rule(
        r"tests/upstream/run\.py --\w+",
        RunElsewhere("scripts/test", "tests/upstream/run.py", "tests/upstream/run.py"),
    ),
    # patches/README.md
    Rule(
        r"scripts/patch-vllm( .*)?",
        RunElsewhere("tests/patches/test_patch_vllm.py", '"patch-vllm"', "scripts/patch-vllm"),
    ),
    # servers
    Rule(r"(\w+=\S+ )?vllm serve MODEL .*", Serves()),
    # docs/operators.md, docs/settings.md
    Rule(r"vllm-saga config .*", Runs({"saga.yaml": "{settings}"}, says="max_hold_s")),
    Rule(r"vllm-saga doctor( --tool-call-parser \w+)?", Runs(says="vLLM")),
    Rule(r"vllm-saga doctor --url .*", Runs({"http://127.0.0.1:8000": "{server}"}, says="KV pool")),
    Rule(r"vllm-saga top", Runs(more="--once --url {server}", says="KV pool")),
    Rule(
        r"vllm-saga top --url .*",
        Runs(
            dict.fromkeys(("http://127.0.0.1:8000", "http://127.0.0.1:30000"), "{server}"),
            "--once",
            says="KV pool",
        ),
    ),
    Rule(r"vllm-saga graph (show|plot) graph\.json.*", Runs({"graph.json": "{graph}"})),
    Rule(r"vllm-saga graph fit traces\.jsonl .*", Runs({"traces.jsonl": "{trace}"})),
    Rule(r"vllm-saga router --help", Runs(says="--backends-file")),
    Rule(r"vllm-saga router --backends .*", Routes()),
    Rule(
        r"vllm-saga router", RunElsewhere("tests/router/test_router_command.py", "router_process")
    ),
    Rule(r"curl .*http://127\.0\.0\.1:30000/.*", AsksRouter()),
    Rule(r"curl .*http://127\.0\.0\.1:8000/.*", AsksServer()),
    # docs/agents.md, vllm_saga/router/CLIENTS.md
    Rule(r"export .*", Exports()),
    Rule(
        r"mini -m openai/MODEL -t .*",
        RunElsewhere("tests/clients/known_clients.py", '"-m", "openai/model", "-y"'),
    ),
    Rule(r"claude", RunElsewhere("tests/clients/known_clients.py", '_cli("claude")')),
    # docs/kubernetes.md
    Rule(
        r"docker build .* --target engine .*",
        NeedsMore({"engine": DOCKERFILE}),
    ),
    Rule(
        r"docker build .* --target router .*",
        NeedsMore({"router": DOCKERFILE}),
    ),
    Rule(r"helm (install .*|template)", RunElsewhere(MANIFESTS, '"template"')),
    Rule(r"kubectl apply -f \S+", RunElsewhere(MANIFESTS, "SAGA_TEST_KUBERNETES")),
    Rule(
        r"kubectl create secret .*",
        NeedsMore({"saga-router": ROUTER_YAML, "admin-api-key": ROUTER_YAML}),
    ),
    Rule(r"kubectl port-forward .*", NeedsMore({"saga-router": ROUTER_YAML, "80": ROUTER_YAML})),
    # docs/ray.md
    Rule(r"scripts/ray( .*)?", RunElsewhere("tests/ray/test_ray_serve.py", '"ray"', "scripts/ray")),
    Rule(r"serve run serve\.yaml", RunElsewhere("tests/ray/ray_fleet.py", "build_openai_app")),
    # vllm_saga/simulator/README.md
    Rule(
        r"vllm-saga simulate .*open:auto.*",
        Runs(more="--sessions 2 --processes 1", seconds=60, says="task mean"),
    ),
    Rule(
        r"vllm-saga simulate( --((?!open:auto).)*)?",
        Runs(
            dict.fromkeys(("mine.jsonl", "sessions.jsonl"), "{trace}"),
            "--sessions 2 --seeds 1 --processes 1",
            says="task mean",
        ),
    ),
    Rule(
        r"vllm-saga simulate calibrate http\S+ --out mine\.json",
        RunElsewhere("tests/live/test_calibrate_live.py", "calibrate.calibrate("),
    ),
    # benchmarks
    Rule(
        r"python -m benchmarks\.docs_plots", Runs(more="--output pictures", says="overcommit.svg")
    ),
    Rule(
        r"python -m benchmarks\.sweep .*",
        Runs(
            {"--traces DIR": "--traces {traces}", **HALF_POOL},
            f"{SMALL_SWEEP} --overcommit 1 --policies vllm,saga --output results --open-loop ''",
            says="summary",
        ),
    ),
    Rule(
        r"python -m benchmarks\.ablation .*",
        Runs(
            {"--traces DIR": "--traces {traces}", **HALF_POOL},
            f"{SMALL_SWEEP} --output results",
            seconds=60,
            says="summary",
        ),
    ),
    Rule(
        r"python -m benchmarks\.fairness.*",
        Runs(
            more="--policies vllm,saga --rate 2 --seeds 1 --sessions 6 --output results",
            seconds=30,
            says="all figures",
        ),
    ),
    Rule(
        r"python -m benchmarks\.replicas --traces DIR( .*)?",
        Runs(
            {" --traces DIR": ""},
            "--replicas 2 --sessions 3 --rate 2 --percent 80 --processes 1"
            " --arrangements vllm@sticky,saga@saga --output results",
            seconds=30,
            says="all figures",
        ),
    ),
    Rule(
        r"python -m benchmarks\.fidelity( --model DIR)?",
        Runs(
            {" --model DIR": ""},
            "--model {model} --sessions 2 --lanes 1 --mean-prompt-tokens 256",
            seconds=180,
            says="predicted",
        ),
    ),
    Rule(r"python -m benchmarks\.live", DEMO),
    Rule(
        r"python -m benchmarks\.overhead",
        Runs(more="--running 4 --waiting 4 --blocks 2000 --rounds 1 --steps 2", says="stock"),
    ),
    Rule(
        r"python -m benchmarks\.traces",
        Runs(more="--running 4 --tokens 10 --rounds 2 --steps 5", seconds=60, says="ratio"),
    ),
    Rule(
        r"python -m benchmarks\.soak",
        Runs(
            more="--minutes 3 --sample-s 5 --model {model} --output soak",
            seconds=300,
            says="tables in the end",
        ),
    ),
    Rule(
        r"(\.venv/bin/)?python -m benchmarks\.equivalence( --\w+)*",
        RunElsewhere(
            "tests/equivalence/test_answers_live.py",
            '"-m", "benchmarks.equivalence"',
            "benchmarks.equivalence",
        ),
    ),
    Rule(
        r"python -m benchmarks\.router_overhead", Runs(more="--rate 20", seconds=120, says="saga")
    ),
)
