"""Baton: serve large language models with disaggregated prefill and decode.

This folder holds one symbolic link per Python folder of the repo, so that everything imports as
`baton.<folder>` and no generic name such as `proto` reaches site-packages.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("baton-serve")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0+uninstalled"
