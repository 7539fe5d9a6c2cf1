"""flux: FLUX.1 [dev] on the cards that people own, from the command line."""

__version__ = "0.1.0"
