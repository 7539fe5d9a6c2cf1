"""Fault rows of `flux plan`: cards and memory that do not exist, or are not said clearly."""

from tests.faults.case import Case, fault

CARDS = {
    "nothing": "",
    "no-number": "GiB",
    "zero": "0",
    "negative": "-8GiB",
    "bytes": "12:sm89",
    "huge": "99999TiB",
    "not-a-number": "nan",
    "unknown": "RTX 9999",
    "several-sizes": "4060 Ti",
    "wrong-size": "4090 8GB",
    "generation": "12GiB:sm",
    "maker": "12GiB:tpu",
    "escape": "\x1b[31m4090",
    "long": "4" * 100_000,
}
for name, card in CARDS.items():

    @fault(f"plan-card-{name}", f"--card {card[:20]!r}", codes=[2], says="--card")
    def plan_card(case: Case, card: str = card) -> None:
        case.flux("plan", f"--card={card}")


for name, ram in {"text": "much", "zero": "0", "huge": "99999TiB", "small": "1KiB"}.items():

    @fault(f"plan-ram-{name}", f"--ram {ram}", codes=[2], says="--ram")
    def plan_ram(case: Case, ram: str = ram) -> None:
        case.flux("plan", "--card", "12GiB", f"--ram={ram}")


@fault("plan-nothing-fits", "a card of 1 GiB", codes=[5], says="GiB")
def plan_nothing_fits(case: Case) -> None:
    case.flux("plan", "--card", "1GiB")
