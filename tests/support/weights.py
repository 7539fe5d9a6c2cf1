"""Weights and activations of which quantizers' errors are measured, by their kinds."""

import torch

WEIGHTS = ("gauss", "laplace", "student-t4", "outlier columns")
ACTIVATIONS = ("gauss", "8 channels x30", "2 channels x150", "gelu", "student-t3")


def make_weight(kind: str, rows: int, columns: int, *, seed: int) -> torch.Tensor:
    """A weight (rows, columns) in float32; outlier columns are 16, twelve times as large."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "gauss":
        return normal
    if kind == "laplace":
        uniform = torch.rand(rows, columns, generator=generator).clamp_(min=1e-7)
        return -normal.sign() * uniform.log()
    if kind.startswith("student-t"):
        return divide_by_chi(normal, int(kind.removeprefix("student-t")), generator)
    chosen = torch.randperm(columns, generator=generator)[:16]
    normal[:, chosen] *= 12
    return normal


def make_activation(kind: str, rows: int, columns: int, *, seed: int) -> torch.Tensor:
    """An activation (rows, columns) in float32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "gauss":
        return normal
    if kind == "gelu":
        return torch.nn.functional.gelu(normal)
    if kind.startswith("student-t"):
        return divide_by_chi(normal, int(kind.removeprefix("student-t")), generator)
    count, _, factor = kind.partition(" channels x")
    chosen = torch.randperm(columns, generator=generator)[: int(count)]
    normal[:, chosen] *= int(factor)
    return normal


def divide_by_chi(normal: torch.Tensor, degrees: int, generator: torch.Generator) -> torch.Tensor:
    """Normal values become those of Student's t with so many degrees of freedom."""
    squares = torch.zeros_like(normal)
    for _ in range(degrees):
        squares += torch.randn(normal.shape, generator=generator).square_()
    return normal / (squares / degrees).sqrt_()


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    """The norm of the difference, divided by that of what is right."""
    right = right.double()
    return float((found.double() - right).norm() / right.norm())
