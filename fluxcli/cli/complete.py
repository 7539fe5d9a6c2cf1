"""What the shell offers for the values of options and arguments.

Each function returns words; those that do not begin with what
was typed are left out by typer. Where nothing is returned, the shell offers files. Reads folders
and headers of files, no weights; loads no torch.
"""

from collections.abc import Callable

from fluxcli.paths import config_folder
from fluxcli.request import controls, presets
from fluxcli.request.settings import SETTINGS, Text
from fluxcli.request.sizes import ASPECT_RATIOS
from quant.errors import ExplainedError

Words = list[str]
Offer = Callable[[], Words]


def offer(*words: str) -> Offer:
    """Return what offers these words."""
    return lambda: list(words)


def _silent(find: Offer) -> Offer:
    """What offers nothing where `find` fails: an error would land in the line that is typed."""

    def found() -> Words:
        try:
            return find()
        except (ExplainedError, OSError):
            return []

    return found


@_silent
def offer_presets() -> Words:
    """The names of the presets, bundled and of one's own."""
    return list(presets.list_presets(config_folder()))


@_silent
def offer_models() -> Words:
    """The models that are here, and those that bundled presets name."""
    from fluxcli.models import local

    here = [each.name for each in local.list_models()]
    return list(dict.fromkeys([*here, *_list_published()]))


@_silent
def offer_local_models() -> Words:
    """The models that are here."""
    from fluxcli.models import local

    return [each.name for each in local.list_models()]


@_silent
def offer_downloads() -> Words:
    """The presets, the models of the hub that they name, and the kinds of control."""
    return [*offer_presets(), *_list_published(), *controls.list_kinds(config_folder())]


@_silent
def offer_controls() -> Words:
    """The kinds of control, bundled and of one's own, before the name of a picture."""
    return [f"{name}:" for name in controls.list_kinds(config_folder())]


@_silent
def offer_loras() -> Words:
    """The adapters that are here, and "none"."""
    from fluxcli.models import loras

    return [*loras.list_loras(), "none"]


@_silent
def offer_sources() -> Words:
    """What can be quantized: the presets and models that are here."""
    return [*offer_presets(), *offer_local_models()]


def offer_devices() -> Words:
    """The devices; which of them are here only torch knows."""
    return ["auto", "cpu", "cuda", "mps", "xpu"]


def offer_ratios() -> Words:
    """The usual aspect ratios."""
    return list(ASPECT_RATIOS)


def offer_values(setting: str) -> Offer:
    """Return what offers the words that a setting of few words takes."""
    kind = SETTINGS[setting].kind
    assert isinstance(kind, Text)
    return offer(*kind.pattern.split("|"))


def _list_published() -> Words:
    """The hub ids of the bundled presets' weights."""
    models = [presets.weights_of(name, config_folder()) for name in offer_presets()]
    return [model for model in dict.fromkeys(models) if "/" in model]
