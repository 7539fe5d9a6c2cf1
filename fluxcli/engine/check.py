"""Whether torch can be imported at all: asked before any module that imports it at its top."""

from fluxcli.errors import DeviceUnusable


def check_torch() -> None:
    """Raise `DeviceUnusable` where torch cannot be imported.

    A broken installation fails with ImportError, OSError and others.
    """
    try:
        import torch  # noqa: F401
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:120]}"
        hint = "pip install --force-reinstall torch"
        raise DeviceUnusable("torch cannot be imported", why=why, hint=hint) from error
