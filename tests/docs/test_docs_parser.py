"""Commands, links and headings are found wherever a page may have them."""

from __future__ import annotations

import pytest
from pages import anchors, blocks, commands, links, without_comment
from rules import RULES
from ways import RunElsewhere, check_options, check_run_elsewhere, run_here, split

PAGE = """\
# A page: `code`, and [a link](other.md#part)

Run `scripts/demo --quick`, or `vllm serve
MODEL --seed 1`; a bare `vllm serve` and `vllm-saga` are names. `benchmarks.overhead` is a module.

```sh
A=1 vllm serve MODEL   # a comment
vllm-saga simulate --load closed:2 \\
    --policy saga
# nothing
curl http://host/#part
```

```console
$ scripts/test --quick
== ruff check
```

```python
print("no command")
```

![a picture](pictures/a.svg)
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_commands(page):
    assert [(command.line, command.text) for command in commands(page)] == [
        (7, "A=1 vllm serve MODEL"),
        (8, "vllm-saga simulate --load closed:2 --policy saga"),
        (11, "curl http://host/#part"),
        (15, "scripts/test --quick"),
        (3, "scripts/demo --quick"),
        (3, "vllm serve MODEL --seed 1"),
        (4, "python -m benchmarks.overhead"),
    ]


def test_blocks_links_and_headings(page):
    assert [block.language for block in blocks(page)] == ["sh", "console", "python"]
    assert links(page) == ["other.md#part", "pictures/a.svg"]
    assert anchors(page) == {"a-page-code-and-a-link"}


@pytest.mark.parametrize(
    "line, left",
    [
        ("a b # c", "a b"),
        ("# all of it", ""),
        ("curl http://x#0,http://y#1", "curl http://x#0,http://y#1"),
        ("""x 'a # b' "c # d" # e""", """x 'a # b' "c # d\""""),
    ],
)
def test_comments(line, left):
    assert without_comment(line) == left


def test_split():
    assert split("A=1 B='x y' vllm serve 'a b'") == (
        {"A": "1", "B": "x y"},
        ["vllm", "serve", "a b"],
    )


@pytest.mark.parametrize(
    "command",
    ["vllm-saga unheard", "scripts/unheard", "python -m benchmarks.unheard", "make it"],
)
def test_what_nobody_tests_has_no_rule(command):
    assert not any(rule.covers(command) for rule in RULES)


def test_mistakes_in_commands_are_found(tmp_path):
    with pytest.raises(AssertionError):
        run_here("vllm-saga graph show none.json", tmp_path)
    with pytest.raises(AssertionError):
        run_here("python -m benchmarks.docs_plots --unheard", tmp_path)
    with pytest.raises(AssertionError):
        check_run_elsewhere(
            "scripts/test --unheard", RunElsewhere(".ci/run", "test", "scripts/test")
        )
    with pytest.raises(AssertionError):
        check_run_elsewhere("scripts/test", RunElsewhere("tests/unheard.py", "test"))
    with pytest.raises(Exception, match="unheard"):
        check_options("benchmarks.overhead", ["--unheard"])
