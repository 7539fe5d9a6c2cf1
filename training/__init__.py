"""How the bundled tiny model is made: data, tokenizers, VAE, transformer, export, check. Not
installed.
"""
