"""Fault rows that show how a row is written: an empty prompt, a weight file cut short."""

from tests.faults.case import Case, fault

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@fault("prompt-empty", "an empty prompt", codes=[2], says="prompt")
def prompt_empty(case: Case) -> None:
    case.draw(prompt="")


@fault("draws", "nothing is wrong", codes=[0])
def draws(case: Case) -> None:
    case.draw("-m", case.model(), "-o", "fox.png")
    assert (case.folder / "fox.png").stat().st_size > 100


for size in (0, 5, 9, 1000):

    @fault(f"weights-cut-{size}", f"the transformer's weights are {size} bytes", codes=[4])
    def weights_cut(case: Case, size: int = size) -> None:
        model = case.model()
        (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:size])
        case.draw("-m", model)
