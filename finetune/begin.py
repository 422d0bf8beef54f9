"""What every command does before it loads its libraries."""

from __future__ import annotations

import os


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
    from finetune.connections import watch

    watch()
