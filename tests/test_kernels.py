"""comfy-kitchen's kernels: which back end a device may use and why no better one, whatever the
library does when it is imported; their operators, by its eager back end.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fluxcli.engine import blocks
from quant import kernels, linear
from quant.errors import SpecError
from quant.kernels import Choice, Library
from tests.support.kitchen import CUDA, TRITON, Registry

LINEAR = ("int8_linear",)
PACKED = ("int8_linear", "w4a8_int8_linear")
CARD = "cuda:0"
NEEDS_13 = "comfy-kitchen cuda: the driver is for CUDA 12, and it needs one for CUDA 13"
NEEDS_SM80 = "comfy-kitchen triton: its int8_linear needs sm80"


BOTH = Registry(cuda=CUDA, triton=TRITON)


@pytest.fixture
def card(monkeypatch) -> Callable[..., None]:
    """Puts a card's capability, its driver and a library in place."""

    def put(
        sm: tuple[int, int] = (8, 6), driver: int = 13010, registry: Registry | None = BOTH
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: sm)
        monkeypatch.setattr(kernels, "read_driver", lambda: driver)
        monkeypatch.setattr(kernels, "load_library", lambda: Library(registry, "it is broken"))

    put()
    return put


def choose(functions=LINEAR, device=CARD, **faults: str) -> Choice:
    """The choice where the named back ends compute wrongly; asked is what was not ruled out."""
    return kernels.choose(functions, device, check=lambda backend: faults.get(backend, ""))


@pytest.mark.parametrize(
    ("sm", "driver", "functions", "found"),
    [
        ((8, 6), 13010, LINEAR, Choice("cuda")),
        ((8, 6), 13000, PACKED, Choice("cuda")),
        ((12, 0), 13010, PACKED, Choice("cuda")),
        ((8, 6), 12080, PACKED, Choice("triton", NEEDS_13)),
        ((7, 5), 13010, LINEAR, Choice("cuda")),
        ((7, 5), 12080, LINEAR, Choice("", f"{NEEDS_13}; {NEEDS_SM80}")),
        (
            (7, 5),
            13010,
            PACKED,
            Choice("", f"comfy-kitchen cuda: its w4a8_int8_linear needs sm80; {NEEDS_SM80}"),
        ),
    ],
)
def test_the_best_back_end_that_card_and_driver_have_is_taken(card, sm, driver, functions, found):
    card(sm, driver)
    assert choose(functions) == found


def test_a_back_end_that_the_library_lacks_is_said_in_its_words(card):
    card(registry=Registry(cuda="no extension", triton="ImportError: No module named 'triton'"))
    why = "comfy-kitchen cuda: no extension"
    why += "; comfy-kitchen triton: ImportError: No module named 'triton'"
    assert choose() == Choice("", why)
    card(registry=Registry(triton=TRITON))
    assert choose() == Choice("triton", "comfy-kitchen cuda: it is not there")
    card(registry=Registry(cuda={"int8_linear": None}, triton=TRITON))
    found = choose(PACKED)
    assert found.backend == "triton" and "no w4a8_int8_linear" in found.why


def test_a_back_end_that_computes_wrongly_gives_way_to_the_next(card):
    assert choose(cuda="its product is wrong") == Choice(
        "triton", "comfy-kitchen cuda: its product is wrong"
    )
    assert choose(cuda="wrong", triton="worse").backend == ""
    assert choose(cuda="wrong", triton="worse").why.endswith("comfy-kitchen triton: worse")


def test_what_a_check_raises_goes_up(card):
    def fail(_: str) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        kernels.choose(LINEAR, CARD, check=fail)


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu:0"])
def test_other_devices_load_no_library_and_hear_nothing_of_it(device, monkeypatch):
    monkeypatch.setattr(kernels, "load_library", lambda: pytest.fail("it was loaded"))
    assert choose(device=device) == Choice("")


def test_the_variable_switches_kernels_off(card, monkeypatch):
    monkeypatch.setenv("FLUX_KERNELS", "off")
    assert choose() == Choice("", "FLUX_KERNELS is off")
    for value in ("", "auto"):
        monkeypatch.setenv("FLUX_KERNELS", value)
        assert choose() == Choice("cuda")
    monkeypatch.setenv("FLUX_KERNELS", "yes")
    with pytest.raises(SpecError, match=r"\(FLUX_KERNELS\): 'yes' is none of auto, off"):
        choose()


# --- the library


@pytest.fixture
def load(monkeypatch, tmp_path) -> Iterator[Callable[[str], Library]]:
    """Loads a package in comfy-kitchen's place that consists of these lines."""

    def load(source: str) -> Library:
        (tmp_path / "kitchen_of_a_test.py").write_text(source)
        sys.modules.pop("kitchen_of_a_test", None)
        return kernels.load_library.__wrapped__()

    monkeypatch.setattr(kernels, "PACKAGE", "kitchen_of_a_test")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield load
    sys.modules.pop("kitchen_of_a_test", None)


NOISE = """
import logging, sys, warnings
print("hello"); print("hello", file=sys.stderr); warnings.warn("hello")
logging.getLogger("kitchen_of_a_test.dispatch").warning("hello")
"""


def test_an_import_says_nothing(load, capfd):
    assert load(NOISE + "registry = 7") == Library(7)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import there_is_no_such_module", "No module named 'there_is_no_such_module'"),
        ("raise OSError('libcudart.so.13: cannot open\\nmore')", "libcudart.so.13: cannot open"),
        ("raise RuntimeError", "RuntimeError"),
        ("(", "'(' was never closed"),
        ("", "has no attribute 'registry'"),
    ],
)
def test_a_library_that_cannot_be_imported_is_no_traceback(load, capfd, source, why):
    found = load(NOISE + source)
    assert found.registry is None and found.why.startswith("comfy-kitchen cannot be imported: ")
    assert why in found.why and "\n" not in found.why
    assert capfd.readouterr() == ("", "")


def test_a_library_that_is_not_there_is_said_with_the_command(monkeypatch):
    monkeypatch.setattr(kernels, "PACKAGE", "kitchen_that_is_not_there")
    assert kernels.load_library.__wrapped__() == Library(
        None, "comfy-kitchen is not installed: pip install 'fluxcli[kernels]'"
    )


def test_without_nvidias_driver_there_is_no_version(monkeypatch):
    ask = "_cuda_getDriverVersion"
    monkeypatch.setattr(torch._C, ask, lambda: 12080, raising=False)
    assert kernels.read_driver() == 12080
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernels.read_driver() == 0
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delattr(torch._C, ask)
    assert kernels.read_driver() == 0


# --- the operators


def make_operands() -> dict[str, tuple[list, dict]]:
    """Small operands of every operator, for the eager back end."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    codes = torch.randint(-127, 128, (24, 64), generator=generator, dtype=torch.int8)
    x, heads = noise(2, 5, 64), noise(1, 5, 2, 64)
    scales = (noise(24, 4).abs() + 1).to(torch.float8_e4m3fn)
    rows = torch.ones(24)
    packed = [codes[:, :32].contiguous(), scales, rows]
    linear = {"bias": noise(24), "rotation": 64, "backend": "eager"}
    levels = torch.arange(-8.0, 8)
    weights = {"query_weight": noise(64), "key_weight": noise(64)}
    norm = {"epsilon": 1e-6, "backend": "eager"}
    return {
        "int8_linear": ([x, codes, rows], linear),
        "packed_linear": ([x, *packed], linear | {"levels": levels}),
        "rms_rope": ([heads, heads + 1, noise(1, 5, 1, 32, 2, 2)], weights | norm),
        "adaln": ([x, noise(2, 1, 64), noise(2, 1, 64)], norm),
    }


@pytest.mark.parametrize("name", make_operands())
def test_an_operator_is_described_without_values_as_it_is(name):
    operands, named = make_operands()[name]
    operator = getattr(torch.ops.flux, name)
    real = operator(*operands, **named)
    with FakeTensorMode() as mode:
        given = tree_map_only(torch.Tensor, mode.from_tensor, (operands, named))
        described = operator(*given[0], **given[1])
    for found, made in zip(tree_leaves(described), tree_leaves(real), strict=True):
        assert (found.shape, found.dtype, found.stride()) == (made.shape, made.dtype, made.stride())


@pytest.mark.parametrize("name", ["int8_linear", "packed_linear"])
def test_no_rows_launch_nothing(name, monkeypatch):
    monkeypatch.setattr(kernels, "load_library", lambda: pytest.fail("a kernel was called"))
    (x, *weight), named = make_operands()[name]
    made = getattr(torch.ops.flux, name)(x[:, :0], *weight, **named)
    assert made.shape == (2, 0, 24) and made.dtype == x.dtype


# --- the check before a kernel is used

SCHEMES = ("int8", "w6a8", "w4a8")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_by_the_library_s_eager_back_end_is_ours_within_a_unit(scheme):
    assert linear._check_kernel(scheme, "cpu", "eager") == ""


@pytest.mark.parametrize("dtype", blocks.KERNEL_DTYPES, ids=str)
def test_norms_by_the_library_s_eager_back_end_are_ours(dtype):
    assert blocks._check_backend("cpu", dtype, "eager") == ""


@pytest.fixture
def spoil(monkeypatch) -> Callable[..., None]:
    """Changes what comfy-kitchen's functions return: `spoil(change)` of (their result)."""
    real = kernels._get_function

    def spoil(change: Callable[[Any], Any]) -> None:
        def get(name: str, backend: str) -> Callable[..., Any]:
            return lambda *given, **named: change(real(name, backend)(*given, **named))

        monkeypatch.setattr(kernels, "_get_function", get)

    return spoil


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("units", "is_found"), [(0.4, False), (2.0, True)])
def test_activations_that_are_two_units_off_are_found(scheme, units, is_found, monkeypatch):
    real = kernels._get_function

    def get(name: str, backend: str) -> Callable[..., Any]:
        def multiply(x: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
            # A constant that is added after the rotation, to all but the rows that show levels.
            unit = linear.rotated.rotate(x.float(), 256).abs().amax(1, keepdim=True) / 127
            unit[:256] = 0
            shift = linear.rotated.rotate(torch.ones(1, 256), 256)
            return real(name, backend)((x + units * unit * shift).to(x.dtype), *given, **named)

        return multiply

    monkeypatch.setattr(kernels, "_get_function", get)
    found = linear._check_kernel(scheme, "cpu", "eager")
    assert ("units of int8" in found) == is_found


@pytest.mark.parametrize("scheme", ["w6a8", "w4a8"])
def test_a_level_that_is_decoded_wrongly_is_found(scheme, monkeypatch):
    real = kernels._get_function

    def get(name: str, backend: str) -> Callable[..., Any]:
        def multiply(x: torch.Tensor, codes: torch.Tensor, *given: Any, **named: Any) -> Any:
            codes = codes.clone()
            codes[7] ^= 4
            return real(name, backend)(x, codes, *given, **named)

        return multiply

    monkeypatch.setattr(kernels, "_get_function", get)
    assert "units of int8" in linear._check_kernel(scheme, "cpu", "eager")


@pytest.mark.parametrize(
    "change", [lambda made: made * float("nan"), lambda made: -made, lambda made: made * 1.5]
)
def test_nonsense_is_found(change, spoil):
    spoil(change)
    assert "units of int8" in linear._check_kernel("int8", "cpu", "eager")


def test_norms_that_are_wrong_are_found(spoil):
    spoil(lambda made: made * 1.03 if torch.is_tensor(made) else made)
    assert "otherwise" in blocks._check_backend("cpu", torch.bfloat16, "eager")
    spoil(lambda made: made if torch.is_tensor(made) else made[::-1])
    assert "otherwise" in blocks._check_backend("cpu", torch.bfloat16, "eager")


@pytest.mark.parametrize(
    "check",
    [
        lambda: linear._check_kernel("int8", "cpu", "eager"),
        lambda: blocks._check_backend("cpu", torch.bfloat16, "eager"),
    ],
    ids=["products", "norms"],
)
def test_a_kernel_that_raises_is_none_and_memory_that_runs_out_says_nothing(check, spoil):
    def fail(error: Exception) -> Callable[[Any], Any]:
        def raise_it(_: object) -> None:
            raise error

        return raise_it

    spoil(fail(RuntimeError("CUDA error: no kernel image\nCompile with")))
    assert check() == "CUDA error: no kernel image"
    spoil(fail(AttributeError("'NoneType' object")))  # a compiler's
    assert check() == "'NoneType' object"
    spoil(fail(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        check()


def test_between_products_torch_computes_where_it_multiplies(card, monkeypatch):
    """So that a picture in bf16 does not depend on what is installed."""
    monkeypatch.setattr(blocks, "CHOSEN", {})
    monkeypatch.setattr(blocks, "_check_backend", lambda *_: "")
    for multiply in ("bf16", "scaled_mm", "int_mm", "dequantize"):
        assert blocks.choose_backend(multiply, CARD, dtype=torch.bfloat16) == Choice("")
    assert blocks.choose_backend("comfy-kitchen cuda", CARD, dtype=torch.float32) == Choice("")
    assert blocks.choose_backend("comfy-kitchen cuda", CARD, dtype=torch.bfloat16).backend == "cuda"
