"""The pages that users read, taken apart: commands, code blocks, links, headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PATTERNS = (
    "README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "deploy/**/*.md",
    "vllm_saga/**/*.md", "benchmarks/*.md", "benchmarks/*/*.md",
    "patches/*.md",
)  # fmt: skip
SHELLS = ("sh", "bash", "console", "shell")
# What makes code between backticks a command: its program, and a word behind it where the
# program alone is a name in prose.
_INLINE = re.compile(
    r"(?:[A-Z_]+=\S* )*"
    r"(?:scripts/[\w-]+|benchmarks\.\w+(?: |$)|tests/\S+\.py "
    r"|(?:vllm-saga|vllm serve|python -m|pip install|curl|helm|kubectl|serve run) [\w./-])"
)
_MODULE = re.compile(r"^benchmarks\.")
_FENCE = re.compile(r"^( *)(`{3,})([\w-]*).*?\n(.*?)^ *\2 *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)", re.DOTALL)
_LINK = re.compile(r"!?\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page: the language it names, and what it holds."""

    page: Path
    line: int
    language: str
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a page, on one line; `str` says where it is."""

    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def pages() -> list[Path]:
    """All pages, in a fixed order."""
    return sorted({path for pattern in _PATTERNS for path in ROOT.glob(pattern)})


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start(4)) + 1
        found.append(Block(page, line, match[3], match[4]))
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks; lines keep their numbers."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text())


def inline_code(page: Path) -> Iterator[tuple[int, str]]:
    """(line, code between single backticks), joined into one line."""
    text = prose(page)
    for match in _CODE.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, " ".join(match[1].split())


def commands(page: Path) -> list[Command]:
    """What a page tells its reader to run."""
    found = [
        Command(page, block.line + number, text)
        for block in blocks(page)
        if block.language in SHELLS
        for number, text in _lines(block)
    ]
    found += [
        Command(page, line, _MODULE.sub("python -m benchmarks.", code))
        for line, code in inline_code(page)
        if _INLINE.match(code)
    ]
    return found


def _lines(block: Block) -> Iterator[tuple[int, str]]:
    """(number, command) of a block of shell: continued lines joined, comments dropped.

    In a `console` block only what follows `$ ` is a command.
    """
    begun, number = "", 0
    for index, line in enumerate(block.text.splitlines()):
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        number = number if begun else index
        begun += line.strip() if not begun else " " + line.strip()
        if begun.endswith("\\"):
            begun = begun[:-1].rstrip()
            continue
        text = without_comment(begun)
        if text:
            yield number, text
        begun = ""


def without_comment(line: str) -> str:
    """A line of shell without what follows a # that begins a word."""
    for word in _WORD.finditer(line):
        if word[0].startswith("#"):
            return line[: word.start()].rstrip()
    return line.rstrip()


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    return _LINK.findall(_CODE.sub("code", prose(page)))


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    names = set()
    for heading in _HEADING.findall(prose(page)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        names.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return names
