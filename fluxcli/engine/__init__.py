"""From checkpoints to pixels. torch begins here, and what it must find set is set before."""

from fluxcli.engine.segments import ask_for_expandable_segments

ask_for_expandable_segments()
