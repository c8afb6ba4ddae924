"""fastft: fine-tune language and vision-language models from config files; convert, merge and verify their weights.

Importing this package costs nothing: torch, transformers and the native module are imported where they are needed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft._native import build_info as build_info

    __version__: str


def __getattr__(name: str) -> Any:
    """`fastft.build_info` and `fastft.__version__`, from the native module on first use."""
    if name in ("build_info", "__version__"):
        from fastft import _native

        return _native.build_info if name == "build_info" else _native.build_info()["version"]
    raise AttributeError(f"module 'fastft' has no attribute {name!r}")
