"""`flux generate`: settings become an order, the order pictures; here or in a warm worker."""

import sys
from typing import Annotated, Any, Optional

import typer

from fluxcli.cli import batch
from fluxcli.cli.draw import draw
from fluxcli.cli.help import MANY, PICTURE
from fluxcli.cli.options import with_request_options
from fluxcli.cli.settings import given_settings, read_prompt, say_what_is_meant, take_stdin
from fluxcli.errors import UsageError
from fluxcli.resolve import resolve_order


@with_request_options
def generate(
    prompt: Annotated[
        Optional[str],
        typer.Argument(help="What to draw; - reads it from stdin.", show_default=False),
    ] = None,
    named_prompt: Annotated[
        Optional[str],
        typer.Option(
            "--prompt",
            help="The same as PROMPT, as an option.",
            metavar="TEXT",
            rich_help_panel=PICTURE,
        ),
    ] = None,
    source: Annotated[
        Optional[str],
        typer.Option(
            "--from",
            help="Text, JSON or CSV, a picture a row; - is stdin.",
            metavar="FILE",
            rich_help_panel=MANY,
        ),
    ] = None,
    *,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="With --from: skip rows whose picture is there.",
            rich_help_panel=MANY,
        ),
    ] = False,
    fail_fast: Annotated[
        bool,
        typer.Option(
            "--fail-fast", help="With --from: stop at a row that fails.", rich_help_panel=MANY
        ),
    ] = False,
    comments: Annotated[
        bool,
        typer.Option(
            "--comments",
            help="With --from: lines that begin with # are notes.",
            rich_help_panel=MANY,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and stop.")
    ] = False,
    **options: Any,
) -> int:
    """Draw a prompt, or with --from many.

    Without weights of your own: -p tiny, the bundled model.
    """
    if named_prompt is not None:
        if prompt is not None:
            raise UsageError(
                "two prompts",
                which="--prompt",
                why="and one without an option",
                hint=f'flux generate "{named_prompt[:40]}"',
            )
        prompt = named_prompt
    if source is not None:
        if dry_run:
            why = "rows are planned one by one"
            raise UsageError("--dry-run excludes --from", why=why, hint="flux plan")
        return batch.draw_rows(
            source,
            prompt,
            options,
            resume=resume,
            fail_fast=fail_fast,
            comments=comments,
        )
    for flag, is_on in (
        ("--resume", resume),
        ("--fail-fast", fail_fast),
        ("--comments", comments),
    ):
        if is_on:
            why = "it is for many pictures"
            raise UsageError(f"{flag} needs --from", why=why, hint="--from prompts.txt")
    given = take_stdin(given_settings(options), prompt=prompt)
    if prompt is None and given.get("redux"):
        prompt = ""  # its pictures say what to draw
    if prompt is None:
        hint = 'flux generate "a red circle on a blue background" -p tiny'
        if sys.stdin is not None and not sys.stdin.isatty():
            hint = f"{hint}; a prompt from stdin is read by: flux generate -"
        raise UsageError("no prompt", hint=hint)
    order = resolve_order(read_prompt(prompt), given)
    if not options["quiet"]:
        say_what_is_meant(given)
    return draw(order, options, given=given, dry_run=dry_run)
