"""A page that shows workflows as lanes over time: what it consists of, ready to be served.

The browser runs it; it asks `/v1/saga/...` of whoever serves it, with the key of who looks at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Literal, NamedTuple

#: Where the page is; what it consists of lies below.
PATH = "/saga"

#: It runs its own scripts only, asks its own server only, and cannot be put in another page.
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_INDEX = "index.html"


class File(NamedTuple):
    body: bytes
    content_type: str


def load(tenant_header: str, served_by: Literal["router", "server"]) -> dict[str, File]:
    """By path, all that is served; the page at `PATH`.

    tenant_header: what the page calls the tenant whose session it ends.
    """
    found = {}
    for source in files(__name__).joinpath("static").iterdir():
        suffix = source.name[source.name.rfind(".") :]
        if suffix in _TYPES:
            found[f"{PATH}/{source.name}"] = File(source.read_bytes(), _TYPES[suffix])
    index = Template(found.pop(f"{PATH}/{_INDEX}").body.decode())
    values = {"tenant_header": escape(tenant_header), "served_by": served_by}
    found[PATH] = File(index.substitute(values).encode(), _TYPES[".html"])
    return found
