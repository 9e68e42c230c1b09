"""What depends on the version of Megatron-Core.

Imports megatron.core. A new release needs a look here, at ``registration`` and at ``slices``.
"""

from __future__ import annotations

import logging

from megatron.core import __version__ as MCORE_VERSION  # noqa: N812 (a constant)

#: Releases that the test-suite ran on.
TESTED_VERSIONS = ("0.19.2",)

logger = logging.getLogger(__name__)


def warn_if_untested() -> None:
    """Warn, once per registration, when Megatron-Core is a release that nobody tested."""
    # Megatron-Core adds the commit of the git folder around it, whosever that is: 0.19.2+c943483.
    if MCORE_VERSION.partition("+")[0] not in TESTED_VERSIONS:
        logger.warning(
            "megatron-adam-mini was tested with megatron-core %s, but this is %s. Run "
            "`make test` of megatron-adam-mini against it before a long run, or install "
            "megatron-core==%s.",
            ", ".join(TESTED_VERSIONS),
            MCORE_VERSION,
            TESTED_VERSIONS[-1],
        )
