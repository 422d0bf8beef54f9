"""Setup that every command needs before it imports heavy libraries."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def begin(alone: bool = True) -> None:
    """Before a command loads its libraries: from here on nothing is reached but what the recipe names. Unless `alone`,
    or on Windows, which has no signals to pass on, in a child process.
    """
    if not alone and os.name == "posix":
        from finetune.supervisor import supervise

        supervise()
    elif os.name == "posix":
        from finetune.crashes import explain_cut_files

        explain_cut_files()
    from backends.transformers_names import keep
    from finetune.connections import watch
    from finetune.disk.digests import cache_folder

    keep(cache_folder() / "transformers.json")
    watch()


def ask_apart(backend: str, device: str) -> None:
    """For a command that asks what a machine can do, and trains nothing: another process loads the framework, unless
    it has answered before.

    Only where the command has its process to itself, as no framework can be loaded there any more.
    """
    main = Path(getattr(sys.modules["__main__"], "__file__", None) or "-")
    command = main.parent if main.name == "__main__.py" else main  # `python -m finetune`, or the script
    if command.stem == "finetune" and "transformers" not in sys.modules:
        from backends import registry
        from finetune.disk.digests import cache_folder

        registry.ask_apart(backend, device, cache_folder() / "machine.json")  # type: ignore[arg-type]  # a device of a recipe
