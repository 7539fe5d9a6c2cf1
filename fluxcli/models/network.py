"""What of the environment keeps the hub's library from the network: certificates and proxies.

The library's own words for it name no variable. Values are not shown: a proxy's may hold a
password. Knows nothing of the hub. Stdlib only.
"""

import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from fluxcli.errors import WeightsUnavailable
from quant.errors import MissingLibrary

PROXIES = ("all", "http", "https")
SOCKS = ("socks5", "socks5h")
SCHEMES = ("http", "https", *SOCKS)
# Of other libraries; a user may think that the hub's reads them, too.
UNREAD = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def check_network(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse certificates and proxies with which no connection can be made.

    Raises `WeightsUnavailable`, and `MissingLibrary` for what a SOCKS proxy needs.
    """
    _check_certificates(environment)
    if environment.get("NO_PROXY", environment.get("no_proxy", "")).strip() == "*":
        return
    for kind in PROXIES:
        for name in (f"{kind}_proxy", f"{kind}_proxy".upper()):
            if environment.get(name):
                _check_proxy(name, environment[name])
                break


def describe_network(environment: Mapping[str, str] = os.environ) -> str:
    """Name the variables that may be why the hub is not reached; "" where none is set."""
    names = ["HF_ENDPOINT"]
    for kind in PROXIES:
        names += [f"{kind}_proxy", f"{kind}_proxy".upper()]
    found = [name for name in names if environment.get(name)]
    for name in UNREAD:
        if environment.get(name) and not Path(environment[name]).exists():
            found.append(f"{name} (there is no such file)")
    return ", ".join(found)


def _check_certificates(environment: Mapping[str, str]) -> None:
    file, folder = environment.get("SSL_CERT_FILE"), environment.get("SSL_CERT_DIR")
    if file:
        why = "there is no such file"
        try:
            if Path(file).is_file():
                ssl.create_default_context(cafile=file)
                why = ""
            elif Path(file).exists():
                why = "it is no file"
        except (OSError, ValueError) as error:
            why = f"no certificates can be read from it ({type(error).__name__})"
        if why:
            _refuse("SSL_CERT_FILE", why)
    if folder and not any(Path(each).is_dir() for each in folder.split(os.pathsep)):
        _refuse("SSL_CERT_DIR", "there is no such folder")


def _refuse(name: str, why: str) -> None:
    hint = f"unset {name}, or set it to what is there"
    raise WeightsUnavailable("the hub cannot be reached", which=name, why=why, hint=hint)


def _check_proxy(name: str, value: str) -> None:
    """Refuse a proxy's address that the library cannot use."""
    address = value.strip()
    if "://" not in address:
        address = f"http://{address}"
    scheme = address.partition("://")[0].lower()
    hint = f"{name}=http://HOST:PORT, or unset {name}"
    what = "the proxy cannot be used"
    if scheme in SOCKS:
        try:
            import socksio  # type: ignore[import-not-found]  # noqa: F401 - the library asks for it
        except ImportError as error:
            hint = f"pip install socksio; or unset {name}"
            why = "a SOCKS proxy needs socksio, which is not installed"
            raise MissingLibrary(what, which=name, why=why, hint=hint) from error
    elif scheme not in SCHEMES:
        why = f"its scheme {scheme[:20]!r} is not {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}"
        if scheme.startswith("socks"):
            hint = f"{name}=socks5://HOST:PORT, or unset {name}"
        raise WeightsUnavailable(what, which=name, why=why, hint=hint)
    try:
        parts = urlsplit(address)
        is_good = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_good = False
    if not is_good or re.search(r"[\s\x00-\x1f\x7f]", address):
        raise WeightsUnavailable(what, which=name, why="it is no address HOST:PORT", hint=hint)
