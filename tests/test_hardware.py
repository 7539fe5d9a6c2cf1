"""The probe: what exists is used, what does not is named, and why; cards by name; what counts as
out of memory.
"""

import tomllib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxcli.engine import device as hardware
from fluxcli.engine.cards import describe_card, read_cards
from fluxcli.errors import DeviceUnusable, ExitCode, UsageError
from fluxcli.paths import BUNDLED
from fluxcli.plan.machine import CONTEXT_BYTES
from fluxcli.plan.placement import GIB
from quant.errors import is_out_of_memory
from quant.linear import Multiplication
from quant.spec import ROTATED
from tests.support.invariant import assert_failed, call

NONE = {"cuda": 0, "xpu": 0, "mps": 0}


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards of 8 GiB, sm86, that are not here."""
    monkeypatch.setattr(hardware, "_count_accelerators", lambda: NONE | {"cuda": 2})
    monkeypatch.setattr(hardware, "ask_multiply", lambda *_: Multiplication("dequantize", "a test"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (7 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (8, 6))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda number: SimpleNamespace(
            name=f"card {number}", uuid=f"id{number}", total_memory=8 * GIB
        ),
    )


def test_auto_takes_the_cpu_where_nothing_else_is(monkeypatch):
    monkeypatch.setattr(hardware, "_count_accelerators", lambda: NONE)
    found = hardware.probe()
    assert found.device == found.kind == "cpu"
    assert found.total_bytes >= found.free_bytes > 0
    assert found.reason


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps", "xpu:1"])
def test_a_device_that_is_not_there_names_what_is(monkeypatch, device):
    monkeypatch.setattr(hardware, "_count_accelerators", lambda: NONE)
    with pytest.raises(DeviceUnusable, match="usable are cpu") as caught:
        hardware.probe(device)
    assert caught.value.exit_code == 8
    assert caught.value.hint


def test_a_cpu_only_torch_beside_an_nvidia_driver_is_said(monkeypatch):
    monkeypatch.setattr(hardware, "_count_accelerators", lambda: NONE)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU-only beside an NVIDIA driver" in hardware.probe().reason
    with pytest.raises(DeviceUnusable, match="CUDA build"):
        hardware.probe("cuda")


def test_an_empty_cuda_visible_devices_is_said(monkeypatch):
    monkeypatch.setattr(hardware, "_count_accelerators", lambda: NONE)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceUnusable, match="CUDA_VISIBLE_DEVICES is ''"):
        hardware.probe("cuda:0")


def test_a_card_is_described_by_its_number_name_and_memory(two_cards, monkeypatch):
    for capability, bf16 in (((7, 5), False), ((8, 6), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number, c=capability: c)
        found = hardware.probe("cuda:1")
        assert (found.device, found.kind, found.name, found.bf16) == (
            "cuda:1",
            "cuda",
            "card 1",
            bf16,
        )
        assert (found.capability, found.identity, found.reason) == (
            capability,
            "cuda id1",
            "--device",
        )
        assert (found.free_bytes, found.total_bytes) == (
            7 * GIB + CONTEXT_BYTES,
            8 * GIB,
        )  # asking made the context
    assert hardware.probe().device == hardware.probe("cuda").device == "cuda:0"
    with pytest.raises(DeviceUnusable, match="cuda:0 cuda:1"):
        hardware.probe("cuda:2")


def test_auto_takes_the_best_of_several_cards_and_says_so(two_cards, monkeypatch):
    cards = [("NVIDIA GeForce RTX 3060", 12), ("NVIDIA GeForce RTX 4090", 24)]
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda number: SimpleNamespace(
            name=cards[number][0], uuid="", total_memory=cards[number][1] * GIB
        ),
    )
    found = hardware.probe()
    assert (found.device, found.name) == ("cuda:1", "NVIDIA GeForce RTX 4090")
    assert "the best of 2" in found.reason and "cuda:0 NVIDIA GeForce RTX 3060" in found.reason
    cards[0] = ("NVIDIA GeForce RTX 5090", 24)  # as much memory, and faster
    assert hardware.probe().device == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert hardware.probe().device == "cuda:1"


def test_a_number_of_amd_is_no_capability_of_nvidia(two_cards, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (11, 0))
    found = hardware.probe()
    assert found.capability == (0, 0) and found.bf16 and not found.speeds.eight_bit


def test_what_a_card_multiplies_in_is_asked_of_it_and_not_of_its_capability(two_cards, monkeypatch):
    said = {
        "fp8": Multiplication("dequantize", "no row-wise kernel"),
        **dict.fromkeys(ROTATED, Multiplication("int_mm")),
    }
    asked = []

    def ask(scheme: str, device: str) -> Multiplication:
        asked.append((scheme, device))
        return said[scheme]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (8, 9))
    monkeypatch.setattr(hardware, "ask_multiply", ask)
    found = hardware.probe("cuda:1")
    assert asked == [(scheme, "cuda:1") for scheme in ("fp8", *ROTATED)]  # and no other device
    assert found.multiply == {"fp8": "dequantize"} | dict.fromkeys(ROTATED, "int_mm")
    assert (found.find_multiply("fp8"), found.find_multiply("int8")) == ("dequantize", "int_mm")
    assert found.explain_multiply("fp8") == "unpacked here, because no row-wise kernel"
    assert found.explain_multiply("int8") == found.explain_multiply("nf4") == ""

    said["fp8"] = Multiplication("scaled_mm per tensor", "no row-wise kernel")
    found = hardware.probe("cuda:1")
    assert found.find_multiply("fp8") == "scaled_mm per tensor"
    assert "multiplied per tensor here, because no row-wise" in found.explain_multiply("fp8")


def test_a_card_that_is_full_when_it_is_asked_goes_by_its_capability(two_cards, monkeypatch):
    def full(scheme: str, device: str) -> Multiplication:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hardware, "ask_multiply", full)
    found = hardware.probe("cuda:1")
    assert found.multiply == {} and found.find_multiply("int8") == "int_mm"
    assert found.find_multiply("fp8") == "dequantize"
    assert found.explain_multiply("fp8") == "unpacked here, because its products need sm89"


CUDA13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built_for", "build"),
    [
        ((6, 1), CUDA13, "cu126"),
        ((7, 0), CUDA13, "cu126"),
        ((12, 0), ["sm_50", "sm_80", "sm_86", "sm_90"], "cu130"),
        ((8, 9), ["sm_75", "sm_90a"], "cu130"),
        ((3, 5), CUDA13, ""),
    ],
)
def test_a_card_that_torch_has_no_kernels_for_is_exit_8_with_the_torch_that_has_them(
    capability, built_for, build, two_cards, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    with pytest.raises(DeviceUnusable, match="has no kernels for the card") as caught:
        hardware.probe("cuda:1")
    error = caught.value
    sm = f"sm{capability[0]}{capability[1]}"
    assert error.exit_code == 8 and error.which == f"cuda:1 card 1, {sm}"
    assert f"torch {torch.__version__} has kernels for {built_for[0]}" in error.why
    assert "--device cpu" in error.hint
    assert ("whl/" + build in error.hint) if build else ("whl" not in error.hint)

    taken = hardware.probe("auto")
    assert taken.kind == "cpu" and taken.gpu_unusable
    assert f"not cuda:0 card 0, {sm}: torch" in taken.reason
    assert taken.gpu_fix == error.hint.removesuffix("--device cpu").removesuffix(", or ")


@pytest.mark.parametrize(
    ("capability", "built_for"),
    [
        ((8, 9), ["sm_75", "sm_86"]),  # of the same major, and no higher minor
        ((13, 0), ["sm_75", "compute_120"]),  # compiled by the driver
        ((9, 0), ["sm_90a"]),
        ((7, 5), CUDA13),
        ((12, 1), CUDA13),
        ((8, 6), []),  # a torch that does not say it
        ((8, 6), ["gfx1100", "gfx942"]),
    ],
)
def test_a_card_that_torch_has_kernels_for_is_taken(capability, built_for, two_cards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    assert hardware.probe("auto").device == hardware.probe("cuda").device == "cuda:0"


def test_auto_takes_the_card_that_torch_has_kernels_for(two_cards, monkeypatch):
    """Although the other has more memory: an old workstation's card beside a new one."""
    found = [(6, 0), (8, 6)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: found[number])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA13)
    taken = hardware.probe("auto")
    assert taken.device == "cuda:1" and "not cuda:0 card 0, sm60: torch" in taken.reason
    monkeypatch.setenv("LOCAL_RANK", "4")
    assert hardware.probe("auto").device == "cuda:1"
    found.reverse()
    assert hardware.probe("auto").device == "cuda:0"


def test_free_memory_is_never_more_than_all_of_it(two_cards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (8 * GIB - 1, 8 * GIB))
    found = hardware.probe()
    assert found.free_bytes == found.total_bytes == 8 * GIB


def test_a_card_that_does_not_answer_is_the_devices_fault(two_cards, monkeypatch):
    def lost(number: int) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    with pytest.raises(DeviceUnusable, match=r"does not answer \(cuda:0\).*unspecified"):
        hardware.probe()


def test_a_driver_that_does_not_answer_is_the_devices_fault(monkeypatch):
    def broken() -> int:
        raise RuntimeError("no driver\nlong text")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    with pytest.raises(DeviceUnusable, match="driver does not answer"):
        hardware.probe()


def test_the_memory_peak_is_of_this_process():
    assert 50 << 20 < hardware.peak_memory("cpu")["rss_bytes"] < 64 << 30


# --- a card that is not here


@pytest.mark.parametrize(
    ("text", "total", "capability", "bf16"),
    [
        ("12GiB:sm89", 12 * GIB, (8, 9), True),
        ("8 GB:sm75", 8 * 10**9, (7, 5), False),
        ("24G", 24 * GIB, (8, 9), True),
        ("16GiB:sm120", 16 * GIB, (12, 0), True),
        ("0.5TiB:sm100", 512 * GIB, (10, 0), True),
        ("12", 12 * GIB, (8, 9), True),
        ("512", 512 * GIB, (8, 9), True),
        ("4090", 24 * GIB, (8, 9), True),
        ("rtx-3090", 24 * GIB, (8, 6), True),
        ("NVIDIA GeForce RTX 2080 Ti", 11 * GIB, (7, 5), False),
        ("4070 ti super", 16 * GIB, (8, 9), True),
        ("RTX 4060 Ti 16GB", 16 * GIB, (8, 9), True),
        ("4060ti:8GiB", 8 * GIB, (8, 9), True),
    ],
)
def test_a_card_is_its_size_and_capability(text, total, capability, bf16):
    found = describe_card(text)
    assert (found.total_bytes, found.free_bytes, found.capability, found.bf16) == (
        total,
        total,
        capability,
        bf16,
    )
    assert found.kind == "cuda" and found.ram_bytes >= found.ram_free_bytes > 0
    assert ("fp8" in found.speeds.eight_bit) == (capability >= (8, 9))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0GiB",
        "GiB:sm89",
        "12GiB:",
        "12GiB:89",
        "12GiB:sm8",
        "12GiB:sm8x",
        "12GiB:sm8999",
        "-1GiB",
        "12GiB:sm89:sm89",
        "RTX 9999",
        "513",
        "12:sm89",
        "16GiB:tpu",
        "4090:sm89",
        "1e3GiB",
        "nan",
        "12 parsecs",
    ],
)
def test_what_describes_no_card_is_exit_2_with_an_example(text, capsys):
    with pytest.raises(UsageError):
        describe_card(text)
    if text:
        message = assert_failed(call(capsys, "plan", f"--card={text}"), ExitCode.USAGE)
        assert "--card 12GiB:sm89" in message


@pytest.mark.parametrize(
    ("text", "device", "gib"),
    [
        ("RX 7900 XTX", "cuda:0", 24),
        ("20GiB:rocm", "cuda:0", 20),
        ("Intel Arc B580", "xpu:0", 12),
        ("16GiB:xpu", "xpu:0", 16),
        ("M4 Max 64GB", "mps", 48),
        ("24GiB:mps", "mps", 16),
    ],
)
def test_cards_of_other_makers_multiply_in_16_bit(text, device, gib, capsys):
    found = describe_card(text)
    assert (found.device, found.total_bytes, found.bf16) == (device, gib * GIB, True)
    assert not found.speeds.eight_bit and found.capability == (0, 0)
    assert call(capsys, "plan", f"--card={text}").returncode == 0


@pytest.mark.parametrize("text", ["4060 Ti", "RTX 3060", "A770", "m3 max", "4090 8GB"])
def test_a_name_with_several_sizes_lists_them(text, capsys):
    message = assert_failed(call(capsys, "plan", f"--card={text}"), ExitCode.USAGE)
    (hint,) = [line for line in message.splitlines() if line.startswith("hint: ")]
    for offered in hint.removeprefix("hint: ").split(" or "):
        assert describe_card(offered.removeprefix("--card ").strip('"'))


def test_every_name_of_the_table_describes_its_card():
    for key, row in table().items():
        for gib in row.get("gib", ()):
            found = describe_card(f"{key} {gib}GiB")
            assert found.name == key and found.speeds.source == f"a table's {key}"
            assert found.ram_bytes == gib * GIB or found.total_bytes == gib * GIB


@given(st.text(max_size=12))
def test_any_text_is_a_card_or_refused(text):
    try:
        assert describe_card(text).total_bytes > 0
    except UsageError as error:
        assert error.hint


# --- the table of cards


def table() -> dict[str, dict]:
    return tomllib.loads((BUNDLED / "shapes" / "cards.toml").read_text())["cards"]


NAMED = {
    "NVIDIA GeForce RTX 4070 Ti SUPER": ("RTX 4070 Ti SUPER", (8, 9)),
    "NVIDIA GeForce RTX 4070 Ti": ("RTX 4070 Ti", (8, 9)),
    "NVIDIA GeForce RTX 4070 SUPER": ("RTX 4070 SUPER", (8, 9)),
    "NVIDIA GeForce RTX 4070": ("RTX 4070", (8, 9)),
    "NVIDIA GeForce RTX 3060 Ti": ("RTX 3060 Ti", (8, 6)),
    "NVIDIA GeForce RTX 3060": ("RTX 3060", (8, 6)),
    "NVIDIA RTX 6000 Ada Generation": ("RTX 6000 Ada", (8, 9)),
    "NVIDIA L4": ("L4", (8, 9)),
    "NVIDIA L40S": ("L40S", (8, 9)),
    "NVIDIA H100 80GB HBM3": ("H100", (9, 0)),
    "NVIDIA A100-SXM4-80GB": ("A100", (8, 0)),
    "Tesla T4": ("T4", (7, 5)),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_card_in_the_table_is_found_by_its_whole_name(name):
    key, capability = NAMED[name]
    found = read_cards().find_speeds("cuda:0", name, capability)
    assert found.source == f"a table's {key}"
    assert found.bus_bytes == table()[key]["bus"] * 1e9 and found.wide < table()[key]["wide"] * 1e12


def test_no_name_in_the_table_is_taken_for_another():
    for key in table():
        if not key.startswith("sm"):
            assert (
                read_cards().find_speeds("cuda:0", f"NVIDIA GeForce {key}", (12, 0)).source
                == f"a table's {key}"
            )


@pytest.mark.parametrize(
    ("name", "capability", "key"),
    [
        ("NVIDIA RTX PRO 4500", (12, 0), "sm120"),
        ("NVIDIA RTX 4000", (8, 9), "sm89"),
        ("Orin", (8, 7), "sm86"),
        ("NVIDIA B200", (10, 3), "sm100"),
        ("a card of tomorrow", (15, 0), "sm120"),
        ("GTX 1080", (6, 1), "gpu"),
        ("L400", (8, 6), "sm86"),
        ("AMD Radeon RX 9999", (0, 0), "rocm"),
    ],
)
def test_an_unknown_name_goes_by_its_capability_and_is_called_a_guess(name, capability, key):
    found = read_cards().find_speeds("cuda:0", name, capability)
    assert (
        found.source == f"a table's guess for {key}"
        and found.bus_bytes == table()[key]["bus"] * 1e9
    )


@given(st.sampled_from([*NAMED, "unknown"]), st.tuples(st.integers(5, 12), st.integers(0, 9)))
def test_8_bit_speeds_are_only_of_cards_that_compute_them(name, capability):
    rates = read_cards().find_speeds("cuda:0", name, capability).eight_bit
    assert ("fp8" not in rates or capability >= (8, 9)) and (
        "int8" not in rates or capability >= (7, 5)
    )
    assert all(rate > 0 for rate in rates.values())


def test_a_measured_row_is_taken_as_it_is_and_says_when():
    row = {"wide": 100, "fp8": 150, "memory": 900, "bus": 20, "pageable": 6}
    row |= {"date": "2026-11-30", "driver": "580.65"}
    table = replace(read_cards(), rows={"RTX 4090": row})
    found = table.find_speeds("cuda:0", "NVIDIA GeForce RTX 4090", (8, 9))
    assert (found.wide, found.eight_bit, found.bus_bytes) == (100e12, {"fp8": 150e12}, 20e9)
    assert (found.memory_bytes, found.pageable_bytes) == (900e9, 6e9)
    assert found.source == "a table's RTX 4090, measured 2026-11-30 with driver 580.65"
    assert found.is_measured and found.without_guesses() == found


def test_every_row_has_a_peak_and_a_bandwidth_of_which_a_share_is_reached():
    cards = read_cards()
    for key, row in table().items():
        found = replace(cards, rows={"cpu": row}).find_speeds("cpu", "", (0, 0))
        assert 0 < found.attention < found.wide < row["wide"] * 1e12, key
        assert 0 < found.memory_bytes < row["memory"] * 1e9 and row["bus"] > 0, key


def test_products_in_8_bit_that_nobody_measured_may_count_as_fast_as_in_16():
    guess = read_cards().find_speeds("cuda:0", "NVIDIA GeForce RTX 4090", (8, 9))
    assert not guess.is_measured and guess.of("fp8") > guess.wide
    assert guess.without_guesses().eight_bit == {"fp8": guess.wide, "int8": guess.wide}
    assert guess.name_source("w4a8") == "a table's RTX 4090, int8 products by its data sheet"
    assert (
        guess.of("w4a8") == guess.of("w6a8") == guess.of("int8") and guess.of("nf4") == guess.wide
    )
    row = table()["RTX 4090"] | {"source": "a report"}
    cards = replace(read_cards(), rows={"RTX 4090": row})
    published = cards.find_speeds("cuda:0", "NVIDIA GeForce RTX 4090", (8, 9))
    assert published.source.endswith("published by a report")
    assert published.without_guesses() == published and published.of("fp8") == row["fp8"] * 1e12
    assert published.name_source("int8") == published.source


def test_products_that_others_have_timed_on_a_cards_generation_count_as_fast_as_they_are():
    for name in ("RTX 3090", "RTX 3060", "an unknown card"):
        found = read_cards().find_speeds("cuda:0", name, (8, 6))
        assert found.without_guesses().of("w6a8") == found.of("int8") > 2 * found.wide
        assert not found.is_measured and "Flux2-INT8" in found.name_source("int8")
        assert found.name_source("") == found.name_source("nf4") == found.source
    for capability in ((7, 5), (8, 0), (8, 7), (8, 9), (12, 0)):
        found = read_cards().find_speeds("cuda:0", "an unknown card", capability)
        assert not found.published and found.without_guesses().of("int8") == found.wide


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_an_unknown_device_of_another_maker_goes_by_its_kind(kind):
    found = read_cards().find_speeds(f"{kind}:0", "a GPU", (0, 0))
    assert found.source == f"a table's guess for {kind}" and not found.eight_bit


# --- memory


OUT_OF_MEMORY = [
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.78 GiB"
    ),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError(
        "HIP out of memory. Tried to allocate 20.00 MiB (GPU 0; 11.98 GiB total capacity)"
    ),
    RuntimeError("HIP error: hipErrorMemoryAllocation"),
    RuntimeError(
        "MPS backend out of memory (MPS allocated: 17.50 GB, other allocations: 300 MB, "
        "max allowed: 18 GB)"
    ),
    RuntimeError("Invalid buffer size: 32.00 GB"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError(
        "XPU out of memory. Tried to allocate 16.00 GiB (GPU 0; 15.56 GiB total capacity)"
    ),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError("Native API failed. Native API returns: -6 (PI_ERROR_OUT_OF_HOST_MEMORY)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you "
        "tried to allocate 4398046511104 bytes."
    ),
    MemoryError(),
    MemoryError("Unable to allocate 4.00 TiB for an array"),
]
SOMETHING_ELSE = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError(
        "The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        "cuda:0 and cpu!"
    ),
    RuntimeError("view size is not compatible with input tensor's size and stride"),
    ValueError("out of memory"),
    KeyError("out of memory"),
    OSError(28, "No space left on device"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_every_back_ends_way_to_say_it_counts_as_out_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", SOMETHING_ELSE, ids=lambda error: str(error)[:40])
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("size", [1 << 50, 1 << 62])
def test_this_machines_own_allocator_counts(size):
    with pytest.raises(RuntimeError) as failed:
        torch.empty(size, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)
    with pytest.raises(RuntimeError) as failed:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(failed.value)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_cpu_has_no_device_memory_to_manage(device, monkeypatch):
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("asked a device")

    for module in (torch.cuda, torch.xpu, torch.mps, torch.cpu):
        for name in (
            "empty_cache",
            "synchronize",
            "reset_peak_memory_stats",
            "set_per_process_memory_fraction",
        ):
            monkeypatch.setattr(module, name, touched, raising=False)
    hardware.cap(device, 1 << 30)
    hardware.empty_cache(device)
    hardware.synchronize(device)
    hardware.reset_peak(device)
    assert hardware.free_memory(device) > 0 and "vram_bytes" not in hardware.peak_memory(device)


@given(st.integers(0, 40 * GIB))
def test_the_cap_and_the_context_together_are_the_budget(budget):
    capped = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 24 * GIB))
        patch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda *given: capped.append(given)
        )
        hardware.cap("cuda:1", budget)
    ((share, device),) = capped
    assert device == "cuda:1" and 0 <= share <= 1
    assert abs(share * 24 * GIB + CONTEXT_BYTES - budget) < 1 or share in (0, 1)
