"""Checkpoint files of FLUX.1: read from their headers, quantize, write.

Knows nothing of prompts, pictures or `fluxcli`. Its face, whose modules are imported by name:

- `quant.checkpoint.inspect` and `quant.single_file.assemble_checkpoint` give the `Checkpoint` of a
  model folder or file; `quant.single_file.inspect_file` says what a file holds.
- `quant.lora.read_adapter` gives the `Adapter` of a LoRA file.
- `quant.codecs.Reader` reads the tensors of a `quant.weights.Weight`, `quant.codecs` also quantizes
  and dequantizes; `quant.linear` has layers that keep their weights quantized.
- `quant.spec.QuantSpec` says how a model is to be stored, `quant.recipe.make_recipe` what that will
  consist of, `quant.bake.bake` writes it.
- `quant.errors` has everything that is raised on purpose.

Every module but `codecs`, `nf4`, `linear` and `bake` is stdlib only. Sizes are in bytes.
"""
