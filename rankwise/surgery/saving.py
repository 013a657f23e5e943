"""What a person should know of an adapter that is written down."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from rankwise.adapters.adapter import Adapter
from rankwise.errors import RankwiseWarning, listing
from rankwise.surgery.sites import Site


def warn_of_sites(name: str, adapter: Adapter, sites: Mapping[str, Site]) -> None:
    """Of sites that PEFT would not apply as they are here, and of some that change nothing where others do.

    PEFT makes a convolution's A with its kernel, stride and padding alone.
    """
    others = [path for path in adapter.sites if sites[path].kind.peft_differs(sites[path].module)]
    if others:
        said = "PEFT's A has neither dilation nor a padding mode: there these layers fail or come out otherwise"
        warnings.warn(f"{name!r}: {said}, unless merged:\n{listing(others)}", RankwiseWarning, 3)
    still = [path for path, factors in adapter.sites.items() if factors.changes_nothing()]
    if 0 < len(still) < len(adapter.sites):
        said = f"{len(still)} of its {len(adapter.sites)} sites change nothing, no training has moved them"
        warnings.warn(f"{name!r}: {said}:\n{listing(still)}", RankwiseWarning, 3)
