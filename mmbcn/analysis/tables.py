"""Tables: pandas, which is needed for nothing else, is imported on first use."""

from types import ModuleType

from mmbcn.errors import UsageError


def import_pandas() -> ModuleType:
    """The module pandas.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise UsageError("tables need pandas: pip install 'mmbcn[analysis]'") from error
    return pd
