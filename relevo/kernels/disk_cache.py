"""Machine code of numba's functions, kept on disk where that is possible."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def kept_on_disk(decorator: Callable[..., Any], function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """decorator: numba.njit or numba.cfunc.

    Without a writable directory (beside the source, under the user's cache, or NUMBA_CACHE_DIR) only in memory.
    """
    try:
        return decorator(*args, cache=True, **options)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        logger.warning("%s; every process will compile it anew: set NUMBA_CACHE_DIR to a writable directory", error)
        return decorator(*args, **options)(function)
