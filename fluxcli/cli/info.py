"""Commands about settings, the machine and models: `flux presets`, `flux doctor`, `flux models download`."""

from dataclasses import asdict
from typing import Annotated, Optional

import typer

from fluxcli import console, models, presets
from fluxcli.cli.options import config_folder
from fluxcli.errors import ExitCode, UsageError
from fluxcli.request import coerce

models_app = typer.Typer(help="Get the weights of a model.", no_args_is_help=True)


def presets_command(
    name: Annotated[Optional[str], typer.Argument(help="Show this one, merged, with each value's origin.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """List the presets, or show what one comes to."""
    if name is None:
        found = []
        for known in presets.available(config_folder()):
            try:
                found.append(presets.load(known, config_folder()))
            except UsageError as error:
                console.say(f"{known}: {error}")
        if json_output:
            console.data_json({each.name: {"description": each.description, **each.settings} for each in found})
        for each in [] if json_output else found:
            console.data(f"{each.name:<10} {each.description}")
        return
    merged = presets.merge({"preset": name}, config_folder())
    if json_output:
        console.data_json({k: {"value": v, "origin": merged.origins[k]} for k, v in merged.values.items()})
        return
    for key, value in merged.values.items():
        if value is not None or key == "guidance":
            console.data(f"{key:<13} {'none' if value is None else value!s:<32} {merged.origins[key]}")


def doctor_command(
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda[:n], mps or xpu[:n].")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Check driver, device, memory, disk, hub and libraries: ok, warn or bad, each with a fix (exit 8: one is bad)."""
    from fluxcli import doctor

    checks = []
    for check in doctor.examine(coerce("device", device, where="--device")):
        checks.append(check)
        if not json_output:
            console.data(f"{check.verdict:<4}  {check.name:<15} {check.found}")
            if check.fix:
                console.data(f"{'':<22}{check.fix}")
    if json_output:
        console.data_json({"checks": [asdict(check) for check in checks]})
    return ExitCode.DEVICE if any(check.verdict == "bad" for check in checks) else ExitCode.OK


@models_app.command()
def download(name: Annotated[str, typer.Argument(help="A preset's name or a hub id.", show_default=False)]) -> None:
    """Download a model's weights into the hub's cache: 34 GB for dev."""
    model = presets.model_of(name, config_folder())
    if model.startswith("bundled/"):
        console.say(f"{name} comes with flux, there is nothing to download")
        console.data(str(models.locate(model)))
    else:
        console.data(str(models.download(model, say=console.say)))
