"""Fills a model's weights from a safetensors checkpoint, reading only the parts that this rank holds.

Files are memory-mapped; float8 weights with block scales are widened as they are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeserve.layers.context import Piece
from moeserve.models.decoder import Decoder
from moeserve.models.spec import BlockFp8, ModelSpec

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes to read)."""

_SCALE = "_scale_inv"


def load(model: Decoder, model_dir: str | Path, progress: Progress | None = None) -> None:
    """Read every weight of `model` from the safetensors files of `model_dir`.

    Raises ValueError that names the file or the tensor: a missing, cut off or corrupt file; a missing,
    unknown or wrongly shaped tensor.
    """
    checkpoint = Checkpoint(model_dir, model.spec)
    pieces = list(model.pieces(checkpoint.names))
    check_names({piece.name for piece in pieces}, checkpoint)
    total = sum(target.nbytes for piece in pieces for target in piece.targets)
    done = 0
    for piece in pieces:
        if piece.targets:
            part = checkpoint.read(piece)
            for target in piece.targets:
                target.copy_(part)
                done += target.nbytes
            if progress is not None:
                progress(done, total)


def check_names(wanted: set[str], checkpoint: Checkpoint) -> None:
    """Raises ValueError unless the checkpoint has what is wanted and nothing unknown besides."""
    missing = wanted - checkpoint.names
    if missing:
        raise ValueError(f"{checkpoint.where}: tensor {_some(missing)} missing")
    unknown = {name for name in checkpoint.names - wanted if not checkpoint.may_be_left(name, wanted)}
    if unknown:
        raise ValueError(
            f"{checkpoint.where}: tensor {_some(unknown)} unknown to {checkpoint.spec.architecture}"
        )


class Checkpoint:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json lists."""

    def __init__(self, model_dir: str | Path, spec: ModelSpec):
        folder = Path(model_dir)
        self.spec = spec
        self._open_files: dict[Path, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self.where = index
            self._files = {name: folder / file for name, file in _read_index(index).items()}
            for file in sorted(set(self._files.values())):
                if not file.is_file():
                    raise ValueError(f"{file}: missing, but {index.name} lists it")
        else:
            self.where = folder / "model.safetensors"
            if not self.where.is_file():
                raise ValueError(
                    f"{folder}: no model.safetensors and no {index.name}; give a safetensors model"
                )
            self._files = dict.fromkeys(self._open(self.where).keys(), self.where)
        self.names = frozenset(self._files)

    def may_be_left(self, name: str, wanted: set[str]) -> bool:
        """Whether a tensor that nothing reads is a scale, rotary table, tied head or prediction layer."""
        if self.spec.quantization is not None and name.endswith(_SCALE) and name[: -len(_SCALE)] in wanted:
            return True
        if name.endswith("rotary_emb.inv_freq"):
            return True
        if name == "lm_head.weight" and self.spec.tied_embeddings:
            return True
        parts = name.split(".")
        return (
            parts[:2] == ["model", "layers"] and parts[2].isdigit() and int(parts[2]) >= len(self.spec.layers)
        )

    def read(self, piece: Piece) -> Tensor:
        """The piece's part of its tensor, widened to float32 if it is stored as float8."""
        part = self._cut(piece.name, piece.cut, piece.shape)
        if part.dtype is not torch.float8_e4m3fn:
            return part
        blocks = self.spec.quantization
        scales = piece.name + _SCALE
        if blocks is None or scales not in self.names:
            raise ValueError(f"{self._files[piece.name]}: {piece.name} is float8 without {scales}")
        return part.float() * self._scales(scales, piece, blocks)

    def _scales(self, name: str, piece: Piece, blocks: BlockFp8) -> Tensor:
        """The scale of each element of the piece's part."""
        *leading, rows, columns = piece.shape
        shape = (*leading, -(-rows // blocks.rows), -(-columns // blocks.columns))
        *first, row_cut, column_cut = piece.cut
        scales = self._cut(name, (*first, slice(None), slice(None)), shape).float()
        return scales[_blocks_of(row_cut, rows, blocks.rows)][
            :, _blocks_of(column_cut, columns, blocks.columns)
        ]

    def _cut(self, name: str, cut: tuple[slice | int, ...], shape: tuple[int, ...]) -> Tensor:
        path = self._files[name]
        try:
            stored = self._open(path).get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise ValueError(
                    f"{path}: {name} has shape {list(stored.get_shape())}, expected {list(shape)}"
                )
            part: Tensor = stored[cut] if cut else stored[:]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {name} cannot be read ({error})") from None
        return part

    def _open(self, path: Path) -> Any:
        if path not in self._open_files:
            try:
                self._open_files[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
        return self._open_files[path]


def _blocks_of(cut: slice | int, size: int, block: int) -> Tensor:
    assert isinstance(cut, slice)
    start, stop, _ = cut.indices(size)
    return torch.arange(start, stop) // block


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a safetensors index with a weight_map ({error})") from None


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more are" if len(listed) > 3 else " is" if len(listed) == 1 else " are"
    return ", ".join(listed[:3]) + more
