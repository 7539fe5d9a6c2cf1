"""What figures are measured with.

The engine's package sets what torch's allocator reads, and comes before torch in every benchmark.
"""

import fluxcli.engine  # noqa: F401
