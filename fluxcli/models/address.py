"""Addresses of the hub, as a browser shows them, become the names that flux takes.

Knows nothing of files or the network. Stdlib only.
"""

import re
from urllib.parse import unquote, urlsplit

from fluxcli.errors import UsageError

HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co")
# hf:ORG/NAME:FILE is a name with a prefix, hf://ORG/NAME/FILE an address.
PREFIX = re.compile(r"(?:hf|huggingface):(?=[^/])", re.IGNORECASE)
HUB_SCHEME = re.compile(r"(?:hf|huggingface)://", re.IGNORECASE)
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# What stands between a repository and a revision in an address, before a file or a folder.
FILE_PAGES = ("resolve", "blob", "raw")
FOLDER_PAGES = ("tree", "commit", "commits")
OTHER_KINDS = ("datasets", "spaces", "docs", "models", "api", "collections", "papers")


def read_address(text: str) -> str:
    """Return ORG/NAME[@REVISION][:FILE] of an address of the hub; other text as it is.

    A revision `main` is left out. Raises `UsageError` for an address of another site, or of what
    is no model of the hub.
    """
    text = text.strip()
    if PREFIX.match(text):
        return text.partition(":")[2]
    if HUB_SCHEME.match(text):
        return _read_path(text.partition("://")[2], text)
    if SCHEME.match(text):
        parts = urlsplit(text)
        host = (parts.hostname or "").lower()
        if parts.scheme.lower() in ("http", "https") and host in HOSTS:
            return _read_path(parts.path, text)
        which = host or parts.scheme
        why = "only addresses of huggingface.co are understood"
        hint = "download the file with a browser, and give its path"
        raise UsageError("not an address of the hub", which=which, why=why, hint=hint)
    host, slash, path = text.partition("/")
    if slash and host.lower() in HOSTS:
        return _read_path(path.partition("?")[0].partition("#")[0], text)
    return text


def _read_path(path: str, text: str) -> str:
    """The name for what stands behind the host: ORG/NAME, then perhaps a page and a revision."""
    owner, _, rest = path.strip("/").partition("/")
    name, _, rest = rest.partition("/")
    if not owner or not name or owner in OTHER_KINDS:
        hint = "ORG/NAME, or ORG/NAME:FILE.safetensors"
        raise UsageError("no model in this address", which=text[:200], hint=hint)
    name, _, revision = name.partition("@")
    page, _, rest = rest.partition("/")
    file = ""
    if page in (*FILE_PAGES, *FOLDER_PAGES):
        revision, _, file = rest.partition("/")
        if page in FOLDER_PAGES:
            file = ""
    elif page:  # hf://ORG/NAME/FILE
        file = f"{page}/{rest}".rstrip("/")
    found = f"{owner}/{name}"
    if revision not in ("", "main"):
        found += f"@{revision}"
    if file:
        found += f":{file}"
    return unquote(found)
