"""Links, settings, flags and snippets of the docs agree with what there is."""

from __future__ import annotations

import ast
import json
import re
import tomllib

import pytest
import typer
import yaml
from known_clients import CLIENTS, PROGRAMS
from pages import ROOT, anchors, blocks, inline_code, links, pages, prose

from vllm_saga.cli import app
from vllm_saga.config import SagaConfig

SETTINGS = ROOT / "docs" / "settings.md"
AGENTS = ROOT / "docs" / "agents.md"
_ROW = re.compile(r"^\| `([\w-]+)` \| ([^|]*) \|", re.MULTILINE)
_FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]+")
_NAME = re.compile(r"[a-z]+(?:_[a-z0-9]+)+")
#: Where flags and names of the docs may come from.
_SOURCES = (
    "vllm_saga/**/*.py", "benchmarks/**/*.py", "scripts/*", "tests/**/*.py", "patches/*/*.patch",
)  # fmt: skip
#: Names and flags of other programs that no source of ours holds.
_FOREIGN = {
    "default_headers", "extra_headers", "model_kwargs", "sticky_least_loaded", "--session-header",
    "--from-literal",
}  # fmt: skip
each_page = pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {target}"
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), f"{link}: there is no such heading"


@each_page
def test_code_is_fenced(page):
    """Commands in an indented block would not be found."""
    for line in re.findall(r"^(?:\n)( {4,}\S.*)$", prose(page), re.MULTILINE):
        assert line.lstrip().startswith(("*", "-", "|", "[")), line


def rows(heading: str) -> dict[str, str]:
    """Name → default, of the table under a heading of docs/settings.md."""
    section = SETTINGS.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return {name: default.strip() for name, default in _ROW.findall(section)}


def test_every_setting_has_its_row_with_its_default():
    shown = rows("Of an engine")
    assert shown.keys() == SagaConfig.model_fields.keys()
    for name, field in SagaConfig.model_fields.items():
        value = field.default
        default = {None: "none", (): "[]", True: "true", False: "false"}.get(
            value if isinstance(value, (tuple, bool, type(None))) else repr(value)
        )
        expected = default or (f"{value:g}" if isinstance(value, float) else str(value))
        assert shown[name] == expected, name


def test_every_flag_of_the_router_has_its_row_with_its_default():
    text = SETTINGS.read_text().partition("## Of the router\n")[2]
    shown = dict(re.findall(r"^\| `(--[\w-]+)` \| ([^|]*?) ?\|", text, re.MULTILINE))
    command = typer.main.get_command(app).commands["router"]
    options = {option.opts[0]: option for option in command.params if option.name != "help"}
    assert shown.keys() == options.keys()
    for name, option in options.items():
        default = option.default
        expected = f"{default:g}" if isinstance(default, (int, float)) else str(default or "")
        if default in (None, False):
            expected = ""
        assert shown[name].strip() in (expected, str(default)), name


@pytest.fixture(scope="module")
def sources() -> str:
    return "\n".join(
        f"{path.name}\n{path.read_text(errors='replace')}"
        for pattern in _SOURCES
        for path in ROOT.glob(pattern)
        if path.is_file() and "tests/docs" not in str(path)
    )


@pytest.fixture(scope="module")
def flags(sources) -> set[str]:
    """All options of our commands and benchmarks, and of vLLM."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    made = ServeSubcommand().subparser_init(parser.add_subparsers())
    found = set(_FLAG.findall(sources)) | set(made._option_string_actions)
    # Typer makes flags of parameters.
    return found | {
        "--" + name.replace("_", "-") for name in re.findall(r"(\w+): Annotated", sources)
    }


@each_page
def test_flags_exist(page, flags):
    code = [code for _, code in inline_code(page)]
    code += [block.text for block in blocks(page) if block.language == "sh"]
    assert set(_FLAG.findall(" ".join(code))) - flags - _FOREIGN == set()


@each_page
def test_names_of_settings_and_fields_exist(page, sources):
    named = {name for _, code in inline_code(page) for name in _NAME.findall(code)}
    assert {name for name in named - _FOREIGN if _series(name) not in sources} == set()


def _series(name: str) -> str:
    """A metric's name as the source has it, where the prefix and the ending are added later."""
    return re.sub(r"^saga_(router_)?|_total$", "", name)


@each_page
def test_snippets_can_be_read(page):
    readers = {
        "python": ast.parse, "json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load,
    }  # fmt: skip
    for block in blocks(page):
        if block.language in readers:
            readers[block.language](block.text)


def test_settings_in_snippets_exist():
    for page in pages():
        for block in blocks(page):
            if block.language == "yaml" and page == SETTINGS:
                SagaConfig.model_validate(yaml.safe_load(block.text))
            for sent in re.findall(r"--additional-config '(\{.*?\})'", block.text):
                SagaConfig.model_validate(json.loads(sent)["saga"])


# -- snippets for clients, and the programs with which these were tried ---------------------------


def imported(tree: ast.AST) -> set[tuple[str, str]]:
    return {
        (node.module or "", alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def called(tree: ast.AST) -> set[str]:
    """Methods that are called, by their last names: `completions.create`, `messages.create`."""
    names = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {".".join(name.split(".")[-2:]) for name in names if "." in name}


def test_python_snippets_call_what_was_tried():
    programs = [ast.parse(path.read_text()) for path in PROGRAMS.glob("*.py")]
    known = set.union(*(imported(tree) for tree in programs))
    calls = set.union(*(called(tree) for tree in programs)) | {"json.dumps"}
    snippets = [block for block in blocks(AGENTS) if block.language == "python"]
    assert len(snippets) >= 3
    for block in snippets:
        tree = ast.parse(block.text)
        assert imported(tree) <= known
        unknown = called(tree) - calls
        assert not {name for name in unknown if not name.endswith("messages.create")}, unknown


def test_configurations_are_those_that_were_tried():
    files = {}
    for client in CLIENTS:
        files |= client.files("http://HOST")
    shown = {block.language: block.text for block in blocks(AGENTS)}
    tried = tomllib.loads(files[".codex/config.toml"])
    assert keys(tomllib.loads(shown["toml"])) <= keys(tried)
    tried = json.loads(files[".config/opencode/opencode.json"])
    opencode = next(b.text for b in blocks(AGENTS) if "@ai-sdk" in b.text)
    assert {key.replace("MODEL", "model") for key in keys(json.loads(opencode))} <= keys(tried)


def keys(tree: object, path: str = "") -> set[str]:
    """Paths of all keys of a configuration."""
    if not isinstance(tree, dict):
        return {path}
    return {path}.union(*(keys(value, f"{path}/{name}") for name, value in tree.items()))
