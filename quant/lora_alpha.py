"""The alpha of an adapter's layers where the file has no tensors of it: from peft's configuration.

diffusers writes that into the file's own metadata, peft into adapter_config.json beside the file.
Stdlib only.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError
from quant.files import read_small_file
from quant.header import Header
from quant.lora_names import ALPHA, split_name

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
NO_ALPHA = "its alpha is no number"
DAMAGED_HINT = "download it again, or choose another one"
CONFIG_HINT = "download it again, or move it away: the adapter then acts without its alpha"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AlphaSource:
    """peft's configuration of an adapter, {} where there is none."""

    path: Path  # of the adapter, for errors
    values: Mapping[str, Any]  # by "COMPONENT.KEY", or by "KEY" for all components
    notices: tuple[str, ...] = ()

    def find_alpha(self, component: str, layers: Sequence[str]) -> float | None:
        """The alpha of a layer that has these names; None where nothing says it.

        Raises `CheckpointError` for one that is no number.
        """
        patterns = self._get(component, "alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(
                "damaged adapter", self.path, why="alpha_pattern is no object", hint=DAMAGED_HINT
            )
        alpha = self._get(component, "lora_alpha")
        for pattern, value in patterns.items():
            if value is not None and any(_ends_in(layer, pattern) for layer in layers):
                alpha = value
                break
        if alpha is None:
            return None
        try:
            return float(alpha)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                "damaged adapter", self.path, why=NO_ALPHA, hint=DAMAGED_HINT
            ) from error

    def uses_rslora(self, component: str) -> bool:
        """Whether alpha is divided by the root of the rank."""
        return self._get(component, "use_rslora") is True

    def _get(self, component: str, key: str) -> Any:
        return self.values.get(f"{component}.{key}", self.values.get(key))


def _ends_in(layer: str, pattern: str) -> bool:
    """Whether a layer's name ends in what a pattern names.

    peft takes the patterns for regular expressions, but trainers write ends of names; an expression
    from a file is never run.
    """
    return f".{layer}".endswith(f".{pattern.lstrip('^').rstrip('$').replace(chr(92), '')}")


def read_alpha_source(path: Path, header: Header, *, ranks: Collection[int]) -> AlphaSource:
    """What says the alphas of an adapter whose layers have these ranks.

    Raises `CheckpointError` for a configuration that cannot be read.
    """
    described = _read_metadata(path, header.metadata)
    if described:
        return AlphaSource(path, described)
    if any(split_name(name)[1] == ALPHA for name in header.tensors):
        return AlphaSource(path, {})
    beside = path.with_name(CONFIG)
    config = _read_config(beside)
    if config and not _describes(config, ranks):
        notice = f"the {CONFIG} beside it is not used: it says other ranks"
        return AlphaSource(path, {}, notices=(notice,))
    if config is None and ranks and any(name.startswith(PEFT_PREFIX) for name in header.tensors):
        notice = f"nothing says its alpha, which peft writes into {CONFIG} beside it: scaled by 1"
        return AlphaSource(path, {}, notices=(notice,))
    return AlphaSource(path, config or {})


def _read_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's configuration as diffusers writes it, its values by "COMPONENT.KEY".

    It is {} where the metadata has none, or no JSON. Raises `CheckpointError` for other JSON.
    """
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        raise CheckpointError("damaged adapter", path, why=NO_ALPHA, hint=DAMAGED_HINT)
    return config


def _read_config(path: Path) -> dict[str, Any] | None:
    """peft's configuration in a file, None without the file; raises `CheckpointError`."""
    if not path.exists():
        return None
    what = "peft's configuration cannot be read"
    try:
        config = json.loads(read_small_file(path, MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error)[:80]
        raise CheckpointError(what, path, why=why, hint=CONFIG_HINT) from error
    if not isinstance(config, dict):
        raise CheckpointError(what, path, why="it is no JSON object", hint=CONFIG_HINT)
    return config


def _describes(config: Mapping[str, Any], ranks: Collection[int]) -> bool:
    """Whether a configuration is that of an adapter with these ranks, as far as it says any."""
    said = [config.get("r")]
    patterns = config.get("rank_pattern")
    if isinstance(patterns, dict):
        said += patterns.values()
    known = {rank for rank in said if isinstance(rank, int)}
    return not known or set(ranks) <= known
