"""Validates files from elsewhere before a library opens them.

The rules for a model folder, the same for every backend:

- weights are `model*.safetensors` alone, and each is read whole-header by the safetensors library first (MLX's own
  reader takes files that it refuses); pickles (`pytorch_model.bin`) are never opened;
- what is read are regular files of that folder. A link may lead to another file of the folder, and in a snapshot of
  the hub's cache (`<repository>/snapshots/<commit>`) to `<repository>/blobs`, where the hub keeps the files; any
  other is refused. An index names its shards by their bare names;
- Python code that comes with a model runs only where the recipe says `model.remote_code: true`;
- a config claims no more blocks and no greater sizes than the tensors have, so that nothing is built of its claims.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from backends.interface import BackendError

Shapes = Mapping[str, tuple[int, ...]]
TENSORS = 200_000  # of one file; the largest published models have 90,000 in 160 files
HEADER = 32 * 2**20  # bytes of a safetensors header; the largest published models have some 10 MB
_MOST = {".json": 16 * 2**20, ".jinja": 2**20, ".txt": 64 * 2**20, ".model": 64 * 2**20, ".safetensors": 2**50}
_VALUES = {b"{": 500_000, b"[": 3_000_000, b",": 6_000_000}  # of JSON; the largest tokenizers have half a million lists
_TOKENIZER = 64 * 2**20  # of tokenizer.json; the largest vocabularies take 35 MB
WEIGHTS, _SHARD = "model*.safetensors", re.compile(r"model[\w.-]*\.safetensors")
_INDEX = "model.safetensors.index.json"
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "n_embd", "num_attention_heads",
    "num_key_value_heads", "n_head", "head_dim", "num_experts", "num_local_experts", "n_routed_experts",
)  # fmt: skip
_SWITCHES = {
    "output_attentions": False, "output_hidden_states": False, "torchscript": False, "return_dict": True,
    "use_return_dict": True,
}  # fmt: skip
_OBJECT, _LIST, _INTEGER = (dict, "an object"), (list, "a list"), (int, "an integer")
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("text_config", "quantization", "quantization_config", "rope_scaling", "rope_parameters"), _OBJECT),
    **dict.fromkeys(("layer_types", "architectures"), _LIST),
    **dict.fromkeys(("sliding_window", "max_position_embeddings", "n_positions"), _INTEGER),
}
_PACKED = 32  # values that one word of a quantised tensor may hold


def read_object(file: Path, most: int = _MOST[".json"]) -> dict[str, Any]:
    """A JSON object. Raises ValueError (not JSON, no object, too large, too deep or too full) or OSError."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("not a regular file")
    if file.stat().st_size > most:
        raise ValueError(f"{file.stat().st_size:,} bytes, and {most:,} are the most")
    data = file.read_bytes()
    if any(data.count(mark) > count for mark, count in _VALUES.items()):
        raise ValueError("millions of values in it")
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def validate(file: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, from a safetensors file whose header and offsets are right. Raises BackendError."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise BackendError(f"{file}: not a regular file")
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > HEADER:
                raise BackendError(f"{file}: its header claims {size:,} bytes, and {HEADER:,} are the most")
            header = opened.read(size)
        if (count := header.count(b"data_offsets")) > TENSORS:
            raise BackendError(f"{file}: its header claims {count:,} tensors, and {TENSORS:,} are the most")
        json.loads(header, object_pairs_hook=_unique)  # of two, readers take one or the other
        with safe_open(file, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise BackendError(f"{file}: not a whole safetensors file ({error!s:.200}); download it again") from None
    except MemoryError:  # a sparse file claims any size
        size = file.stat().st_size
        raise BackendError(f"{file}: {size:,} bytes, and this machine cannot map so many; is it whole?") from None


def check_files(folder: Path, downloaded: bool = True) -> dict[Path, Shapes]:
    """The safetensors files of a model folder, each validated, with the shapes of their tensors.

    downloaded: whether the files that the index names must be there.
    Raises BackendError where a file, a link or the index breaks a rule of this module.
    """
    root = folder.resolve()
    inside = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    shapes: dict[Path, Shapes] = {}
    for file in _entries(folder):
        target = _target(file)
        if not any(allowed in target.parents for allowed in inside):
            raise BackendError(f"{file}: a link out of the model's folder; put the file itself there")
        _check_file(file)
        if file.suffix == ".safetensors":
            shapes[file] = validate(file)
    if (folder / "adapter_config.json").exists():  # transformers would load the base that it names instead
        raise BackendError(f"{folder}: an adapter's folder (adapter_config.json), and a base model is needed")
    for shard in {*indexed(folder).values()} if downloaded else ():
        if not (folder / shard).is_file():
            raise BackendError(f"{folder / _INDEX}: {shard} is not there; download the model again")
    return shapes


def _target(file: Path) -> Path:
    """Where a link leads. Raises BackendError where it leads to itself."""
    try:
        return file.resolve()
    except (OSError, RuntimeError):  # RuntimeError: Python before 3.13
        raise BackendError(f"{file}: a link that leads back to itself; put the file itself there") from None


def check_names(weights: Mapping[Path, Shapes]) -> None:
    """Each tensor stands in one file of the model: of two, libraries take one or the other. Raises BackendError."""
    files: dict[str, Path] = {}
    for file, shapes in weights.items():
        if twice := next((name for name in shapes if name in files), None):
            raise BackendError(f"{file}: {twice} stands in {files[twice].name} too; remove one of the files")
        files |= dict.fromkeys(shapes, file)


def used_files(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The weight files that are the model, of all that lie in a checked folder, as transformers chooses them.

    One that the config names, model.safetensors, or those that the index names; without these three, all.
    """
    named = config.get("transformers_weights")
    for single in (str(named), "model.safetensors"):
        if (folder / single).is_file():
            return [single]
    if (folder / _INDEX).exists():
        return sorted({*indexed(folder).values()})
    return sorted(file.name for file in folder.glob(WEIGHTS))


def files_to_download(folder: Path) -> list[str]:
    """The weight files of a model of which only what stands beside them is there: those that config or index name.

    Empty where there is no config, and so no model. Raises BackendError.
    """
    if not (folder / "config.json").is_file():
        return []
    config = _object(folder / "config.json")
    check_weights_named(folder, config)
    if named := config.get("transformers_weights"):
        return [str(named)]
    return sorted({*indexed(folder).values()}) or ["model.safetensors"]


def needs_code(folder: Path, why: object) -> BackendError:
    return BackendError(
        f"{folder}: the model comes with Python code of its own ({why}), which is not run. If you have read it and "
        "trust it, set model.remote_code: true"
    )


def check_claims(folder: Path, parts: Iterable[Mapping[str, Any]], shapes: Shapes) -> None:
    """Raises BackendError where a config claims more than the tensors have.

    parts: the config and, where models are nested, that of the language model. shapes: of all the folder's tensors.
    """
    blocks = 1 + max((int(at) for name in shapes for at in re.findall(r"\.(\d{1,9})\.", name)), default=0)
    largest = max((size for shape in shapes.values() for size in shape), default=0) * _PACKED
    for part in parts:
        limits = dict.fromkeys(_SIZES, largest) | {"num_hidden_layers": blocks, "n_layer": blocks, "num_layers": blocks}
        for key, most in limits.items():
            value = part.get(key)
            if value is None or (isinstance(value, list) and key not in ("vocab_size", "hidden_size")):
                continue  # some models have a value for each layer
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
                raise BackendError(f"{folder}: config.json says {key}: {_short(value)}, which the weights do not have")


def check_code(folder: Path, config: Mapping[str, Any], remote_code: bool) -> None:
    """Raises BackendError where a config names code or files that are not the model's, or code that may not run."""
    kind = config.get("model_type", "")
    if not isinstance(kind, str) or not re.fullmatch(r"[\w.-]*", kind) or ".." in kind:
        raise BackendError(f"{folder}: config.json says model_type: {_short(kind)}, which is not a model name")
    if config.get("model_file") is not None and not remote_code:
        raise needs_code(folder, f"model_file: {_short(config['model_file'])}")
    check_weights_named(folder, config)
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        if "/" in str(config.get(key)) and not remote_code:  # a kernel that would be downloaded
            raise needs_code(folder, f"{key}: {_short(config[key])}")


def check_weights_named(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises BackendError where a config names another file than one of the weights."""
    weights = config.get("transformers_weights")
    if weights is not None and not _SHARD.fullmatch(str(weights)):
        raise BackendError(f"{folder}: config.json says transformers_weights: {_short(weights)}, not {WEIGHTS}")


def check_switches(folder: Path, parts: Iterable[Mapping[str, Any]]) -> None:
    """Raises BackendError where a config changes what the model's forward pass gives, or holds a value of a kind that
    no library writes. parts: as of `check_claims`.
    """
    for part in parts:
        for key, (kind, named) in _KINDS.items():
            if (value := part.get(key)) is not None and not isinstance(value, kind):
                raise BackendError(f"{folder}: config.json says {key}: {_short(value)}, which is not {named}")
        for key, usual in _SWITCHES.items():
            if (value := part.get(key)) is not None and bool(value) != usual:
                raise BackendError(
                    f"{folder}: config.json says {key}: {_short(value)}, which changes what the model gives; remove it"
                )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    header = dict(pairs)
    if len(header) < len(pairs):
        raise ValueError("a key of its header stands twice")
    return header


def _entries(folder: Path) -> Iterator[Path]:
    """The files of a model folder that some library may read."""
    for directory in (folder, folder / "additional_chat_templates"):
        if directory.is_dir():
            yield from sorted(file for file in directory.iterdir() if file.is_symlink() or file.suffix in _MOST)


def _check_file(file: Path) -> None:
    most = _TOKENIZER if file.name == "tokenizer.json" else _MOST.get(file.suffix)
    if most is None:
        return
    if not file.is_file():
        raise BackendError(f"{file}: not a file")
    if file.stat().st_size > most:
        raise BackendError(f"{file}: {file.stat().st_size:,} bytes, and {most:,} are the most")


def indexed(folder: Path) -> dict[str, str]:
    """The index of a folder: tensor -> the file that has it. Empty where there is none. Raises BackendError."""
    if not (folder / _INDEX).exists():
        return {}
    shards = _object(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict):
        raise BackendError(f"{folder / _INDEX}: no weight_map in it")
    for shard in {str(one) for one in shards.values()}:
        if not _SHARD.fullmatch(shard):
            raise BackendError(f"{folder / _INDEX}: {_short(shard)} is not the bare name of one of {WEIGHTS}")
    return {name: str(shard) for name, shard in shards.items()}


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise BackendError(f"{file}: cannot be read ({error!s:.200})") from None


def _short(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
