"""flux: FLUX.1 [dev] on the cards that people own, from the command line."""

__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """Versions of what decides the pixels."""
    import platform
    from importlib.metadata import version

    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return {"flux": __version__, "python": platform.python_version()} | libraries
