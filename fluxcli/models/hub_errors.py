"""What the errors of huggingface_hub mean: for the user, and for whether to try again.

The library's own texts are not shown: they hold addresses.
"""

from pathlib import Path

from fluxcli.errors import OutputError, WeightsUnavailable
from fluxcli.models.local import list_models
from fluxcli.models.network import describe_network
from quant.errors import ExplainedError


def explain(error: Exception, name: str, target: Path) -> Exception:
    """Return the error that the user is told instead; an unknown one is returned unchanged.

    `name` is what was asked of the hub, and `target` where it should go.
    """
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, ExplainedError):
        return error
    cause = _find_cause(error)
    if _get_status(cause) or isinstance(cause, HFValidationError):
        return _explain_answer(cause, name)
    return _explain_failure(cause, name, target)


def _explain_answer(error: Exception, name: str) -> WeightsUnavailable:
    """What the hub's refusal means, and what to do about it."""
    from huggingface_hub import errors, get_token

    page = f"huggingface.co/{name.partition(':')[0]}"
    if isinstance(error, errors.GatedRepoError):
        why = "this account or its token has no access" if get_token() else "nobody is logged in"
        steps = (
            f"1. accept the licence at {page}; "
            "2. make a read token at huggingface.co/settings/tokens; "
            f"3. hf auth login; 4. flux models download {name}"
        )
        return WeightsUnavailable("the model is gated", which=name, why=why, hint=steps)
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        why = "the hub knows no such model, or this account may not see it"
        hint = f"look at {page}, then: hf auth login"
        return WeightsUnavailable("no such model", which=name, why=why, hint=hint)
    if isinstance(error, errors.RevisionNotFoundError):
        hint = f"{page}/commits/main has them"
        return WeightsUnavailable("no such revision", which=name, hint=hint)
    status = _get_status(error)
    what = "the hub does not deliver"
    hint = "try it later"
    if status in (401, 403):
        what = "the hub refuses the token"
        hint = "hf auth login"
    return WeightsUnavailable(what, which=name, why=f"HTTP {status}", hint=hint)


def _explain_failure(error: Exception, name: str, target: Path) -> Exception:
    """What an error on the way to the hub, or of the disk, means."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    kind = type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        what = "nothing is downloaded"
        why = "HF_HUB_OFFLINE is set"
    elif _is_drop(error):
        what = "the hub is out of reach"
        why = f"no connection ({kind})"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            why = (
                "its certificate is not trusted; SSL_CERT_FILE names the file of another authority"
            )
        named = describe_network()
        if named:
            why += f"; set are {named}"
    elif isinstance(error, OSError) and error.errno is not None:
        hint = "HF_HUB_CACHE=FOLDER stores it elsewhere"
        why = error.strerror or kind
        return OutputError("cannot store the model", which=target, why=why, hint=hint)
    elif isinstance(error, ValueError | OSError):
        what = "the hub is not understood"
        why = f"{kind}: the page of a proxy?"
    else:
        return error
    here = ", ".join(f"{each.name} ({each.state})" for each in list_models())
    return WeightsUnavailable(what, which=name, why=why, hint=f"without it there is {here}")


def _find_cause(error: Exception) -> Exception:
    """What made the library give up: it wraps the error of the network or the hub once."""
    from huggingface_hub import errors

    wrappers = (errors.RevisionResolutionError, errors.DryRunError, errors.LocalEntryNotFoundError)
    if isinstance(error, wrappers) and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error


def _get_status(error: Exception) -> int:
    """The HTTP status that the hub answered, 0 if it did not answer."""
    response = getattr(error, "response", None)
    return 0 if response is None else response.status_code


def _is_drop(error: Exception) -> bool:
    """Whether the connection failed; xet raises a RuntimeError of any kind for that."""
    if isinstance(error, ConnectionError | TimeoutError | RuntimeError):
        return True
    return type(error).__module__.startswith(("httpx", "hf_xet"))


def may_pass(error: Exception) -> bool:
    """Return whether it makes sense to try again: the server failed, or the connection did."""
    error = _find_cause(error)
    return _get_status(error) >= 500 or (_get_status(error) == 0 and _is_drop(error))


def is_wrong_size(error: Exception) -> bool:
    """Return whether the library got another number of bytes than announced.

    That is its only error that is a bare OSError.
    """
    return type(error) is OSError and error.errno is None


def name_failure(error: Exception) -> str:
    """Return a word for what failed, for a line about the next try."""
    error = _find_cause(error)
    status = _get_status(error)
    return f"HTTP {status}" if status else f"connection dropped ({type(error).__name__})"
