"""The shortest plain diffusers script that does what `flux generate -p tiny` does, to time flux
against.

python benchmarks/plain_diffusers.py OUT.png
"""

import sys

import torch
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("presets/tiny", torch_dtype=torch.float32)
image = pipe(
    "a red circle on a blue background",
    width=128,
    height=128,
    num_inference_steps=10,
    guidance_scale=3.5,
    max_sequence_length=24,
    generator=torch.Generator("cpu").manual_seed(1),
).images[0]
image.save(sys.argv[1])
