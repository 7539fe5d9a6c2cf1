"""Models that take a control picture, pictures to control by, and what diffusers draws of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

SIDE_PX = 96


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_control_model(tiny_folder: Path, folder: Path) -> Path:
    """The bundled model with 128 input channels, as BFL's Canny and Depth have them."""
    shutil.copytree(tiny_folder, folder)
    change_config(folder / "transformer", in_channels=128, out_channels=64)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "FluxControlPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    (path,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    own = tensors["x_embedder.weight"]
    made = torch.Generator().manual_seed(3)
    more = torch.randn(own.shape, generator=made) * own.float().std()
    tensors["x_embedder.weight"] = torch.cat([own, more.to(own.dtype)], dim=1)
    save_file(tensors, path, {"format": "pt"})
    return folder


def draw_map(path: Path, seed: int = 0, size: tuple[int, int] = (SIDE_PX, SIDE_PX)) -> Path:
    """A map of white lines on black, and of a white area in a corner."""
    width, height = size
    made = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.uint8)
    for k in made.integers(4, min(size) - 4, 4):
        pixels[k, 4:-4] = 255
        pixels[4:-4, k] = 255
    corner = pixels[:, : width // 2] if seed % 2 else pixels[:, width // 2 :]
    corner[: height * 3 // 5] = 255
    Image.fromarray(pixels).save(path)
    return path


def draw_photo(path: Path, seed: int = 0, size: tuple[int, int] = (SIDE_PX, SIDE_PX)) -> Path:
    """A coloured picture."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    red = 127 + 100 * np.sin(x / 9 + seed)
    pixels = np.stack([red, y * 255 / height, np.full(x.shape, 90 + 20 * seed)], axis=2)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 240, 20)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def draw_mask(path: Path, size: tuple[int, int] = (SIDE_PX, SIDE_PX)) -> Path:
    """White on the left half, black on the right."""
    width, height = size
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, : width // 2] = 255
    Image.fromarray(pixels).save(path)
    return path


def open_image(path: Path) -> Image.Image:
    """A picture in RGB, its file closed."""
    with Image.open(path) as image:
        return image.convert("RGB")
