"""Maps a layer's name in the checkpoint to its name in transformers, PEFT and mlx-lm.

A layer's own name is the checkpoint's: backends, checkpoints and dropout know it by that. For each library a module
says the layer's name there (`Library`): read from the library's own tree, or by a rule where it is not installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from backends.interface import BackendError, CheckedFolder, ModelSpec, Modules, NumberType
from backends.text_blocks import ending


class Part(NamedTuple):
    """The rows `first` to `last` of a layer, as a layer of its own; most libraries have every layer whole."""

    name: str
    first: int
    last: int


Names = Mapping[str, tuple[Part, ...]]  # a layer's name in the checkpoint -> its parts, which together are the layer
Tensors = Mapping[str, tuple[int, ...]]  # a tensor's name -> its shape


@dataclass(frozen=True)
class Tree:
    """The linear layers of a model as a library builds it, and what the names of its blocks begin with."""

    linear: Modules
    stack: str  # "model.layers."


class Library(Protocol):
    """What a backend's module for another library's adapter folders exports. Importing it loads no framework."""

    NAME: str  # "PEFT"
    HEADS: bool  # whether it has models with a classification head

    def names(self, folder: CheckedFolder, modules: Modules) -> Names:
        """The library's names of these layers; by a rule where it is not installed or cannot build the model."""

    def looks_for(self, folder: CheckedFolder, config: Mapping[str, Any]) -> Tensors:
        """The tensors that the library expects in an adapter folder with this config, for the folder's model.

        Raises ImportError where it is not installed, BackendError with the reason where it would not load the folder.
        """

    def differs(self, folder: CheckedFolder) -> str:
        """What the library computes otherwise than a session does, in words; "": nothing that is known."""

    def lines(
        self, model: ModelSpec, base: str, adapter: str, number_type: NumberType, labels: Sequence[str] = ()
    ) -> str:
        """Python that loads the base as a session of `model` holds it, in this type, with the adapter: `model`.

        base, adapter: where they are, for a person who runs it. labels: among which a head chooses (`HEADS`).
        """

    def whole_lines(self, folder: CheckedFolder) -> str:
        """Python that loads the folder that it is run in, a whole model like `folder`'s, in float32: `model`."""


def whole(names: Mapping[str, str], modules: Modules) -> dict[str, tuple[Part, ...]]:
    """Each layer as one part of this name."""
    return {module: (Part(names[module], 0, outputs),) for module, (outputs, _) in modules.items()}


def under(stack: str, modules: Modules) -> dict[str, tuple[Part, ...]]:
    """Each layer whole, where only the beginning of names differs."""
    before = stack.removesuffix("layers.")
    return whole({module: before + ending(module) for module in modules}, modules)


def matched(tree: Tree, modules: Modules, library: str, path: object) -> dict[str, tuple[Part, ...]]:
    """Each layer whole, as the tree names it. Raises BackendError where no layer of that name and shape is there."""
    before, names, missing = tree.stack.removesuffix("layers."), {}, []
    for module, shape in modules.items():
        matches = [name for name in (before + ending(module), module) if tree.linear.get(name) == tuple(shape)]
        if matches:
            names[module] = matches[0]
        else:
            missing.append(module)
    if missing:
        raise BackendError(lacking(path, library, missing))
    return whole(names, modules)


def lacking(path: object, library: str, modules: list[str]) -> str:
    """That a library's model has no such linear layers, with the remedy."""
    leaves = sorted({module.rsplit(".", 1)[-1] for module in modules})
    shown = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    return (
        f"{path}: {library}'s model has no linear layer for {shown}; leave {', '.join(leaves)} out of lora.targets, "
        "or use another backend"
    )


# What is computed and not learned, and yet stands in older checkpoints: rotary frequencies, masks, positions.
_COMPUTED = re.compile(r"inv_freq$|position_ids$|\.(attn|attention|self_attn)\.(masked_)?bias$")


def refuse_untaken(
    folder: CheckedFolder, library: str, left: Iterable[str], taken: Iterable[str], lacks: bool = False
) -> None:
    """Raises BackendError where weights of the language model have no place in the library's model:
    it would compute something else than the model that was trained. Where it has such layers, or lacks others, the form
    of the weights is another one: experts one by one or in plain numbers, where mlx-lm takes them stacked or packed.

    left, taken: names of tensors in that model, those that it has no place for and those that it has.
    lacks: whether blocks of it are left without some of theirs.
    """
    known = {within(name) for name in taken}
    lost = {within(name) for name in left} - known
    names = [name for name in folder.shapes if within(name) in lost and is_used(folder, name)]
    if not names:
        return
    files = sorted(file.name for file, shapes in folder.weights.items() if any(name in shapes for name in names))
    shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    where = f"{folder.path}: {', '.join(files)}"
    if lacks or all(f"{within(name)}.weight" in known for name in names):
        raise BackendError(
            f"{where}: {library} does not take {shown} in the form in which these files hold them; use another "
            "backend, or give the model as its makers publish it (experts stacked, or in MXFP4)"
        )
    raise BackendError(
        f"{where}: no layer of {library}'s model takes {shown}; config.json is of another model than the weights: "
        "download both again"
    )


def within(name: str) -> str:
    """From the blocks on, where names are alike in all libraries; of what stands beside the blocks, its own name."""
    inside = re.search(r"\blayers\.\d+\..+", name)
    return inside[0] if inside else ".".join(name.split(".")[-2:])


def is_used(folder: CheckedFolder, name: str) -> bool:
    """Whether a tensor is of a block that the config counts, or stands beside the blocks, and is learned."""
    model = folder.stack.removesuffix("layers.")
    if not name.startswith(model) or _COMPUTED.search(name):
        return False
    match = re.match(rf"{re.escape(folder.stack)}(\d+)\.(.+)", name)
    if match is None:
        return name.removeprefix(model).count(".") == 1
    blocks, shared = (folder.text_config.get(key) for key in ("num_hidden_layers", "num_kv_shared_layers"))
    block = int(match[1])
    if type(blocks) is int and block >= blocks:  # it predicts further tokens
        return False
    borrows = type(blocks) is int and type(shared) is int and block >= blocks - shared > 0
    return not (borrows and re.search(r"\b[kv]_(proj|norm)\b", match[2]))
