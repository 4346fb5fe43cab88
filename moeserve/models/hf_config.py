"""Reads a Hugging Face config.json field by field; each missing or odd field is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeserve.models.spec import BlockFp8, LinearScaling, Llama3Scaling, RopeSpec, YarnScaling

_DTYPES = ("bfloat16", "float16", "float32")


class HfConfig:
    """The fields of one config.json (or of a table inside it); `where` opens every error."""

    def __init__(self, fields: Mapping[str, Any], where: str):
        self.fields = fields
        self.where = where

    @classmethod
    def read(cls, model_dir: str | Path) -> HfConfig:
        """Raises ValueError naming the file when it is missing, cut off or not an object."""
        path = Path(model_dir) / "config.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read ({error.strerror}); give a Hugging Face model directory"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON ({error}); is the file complete?") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: holds a {type(fields).__name__}, expected an object")
        return cls(fields, str(path))

    def error(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{self.where}: {name} = {self.fields.get(name)!r}: {wanted}")

    def integer(self, name: str, default: int | None = None, at_least: int = 1) -> int:
        """The whole number `name`; absent or null it is `default`, and without one an error."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise self.error(name, f"must be a whole number, {at_least} or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """The finite number `name`, above 0."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.error(name, "must be a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def one_of(self, name: str, allowed: tuple[str, ...], default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(name, f"must be {' or '.join(allowed)}")
        return value

    def table(self, name: str) -> HfConfig | None:
        """The object `name`; None when absent or null."""
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return HfConfig(value, f"{self.where}: {name}")

    def has(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is not None:
            return value
        if default is None:
            raise ValueError(f"{self.where}: {name} is missing")
        return default


def read_rope(config: HfConfig, dim: int, interleaved: bool = False) -> RopeSpec:
    """The rotary embedding: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    if dim % 2:
        raise ValueError(f"{config.where}: rotary dimension {dim} is odd; it must be even")
    table = config.table("rope_parameters") or config.table("rope_scaling")
    theta_in = table if table is not None and table.has("rope_theta") else config
    theta = theta_in.number("rope_theta", 10000.0)
    if table is None:
        return RopeSpec(theta, dim, interleaved)
    if table.fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise table.error("partial_rotary_factor", "only 1.0 is supported")
    name = "rope_type" if table.has("rope_type") else "type"
    kind = table.one_of(name, ("default", "linear", "llama3", "yarn"), "default")
    if kind == "default":
        return RopeSpec(theta, dim, interleaved)
    factor = table.number("factor")
    if kind == "linear":
        return RopeSpec(theta, dim, interleaved, LinearScaling(factor))
    original = table.integer("original_max_position_embeddings")
    if kind == "llama3":
        low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
        if high <= low:
            raise table.error("high_freq_factor", f"must be above low_freq_factor = {low}")
        return RopeSpec(theta, dim, interleaved, Llama3Scaling(factor, original, low, high))
    yarn = YarnScaling(
        factor,
        original,
        beta_fast=table.number("beta_fast", 32.0),
        beta_slow=table.number("beta_slow", 1.0),
        mscale=table.number("mscale") if table.fields.get("mscale") else 0.0,
        mscale_all_dim=table.number("mscale_all_dim") if table.fields.get("mscale_all_dim") else 0.0,
        attention_factor=table.number("attention_factor") if table.has("attention_factor") else None,
        truncate=table.flag("truncate", True),
    )
    return RopeSpec(theta, dim, interleaved, yarn)


def read_dtype(config: HfConfig) -> str:
    """dtype (transformers 5) or torch_dtype; float32 when neither is given, as transformers reads it."""
    return config.one_of("dtype" if config.has("dtype") else "torch_dtype", _DTYPES, "float32")


def read_quantization(config: HfConfig) -> BlockFp8 | None:
    """The weights' quantization: none, or float8 with a scale for each block as DeepSeek publishes it."""
    table = config.table("quantization_config")
    if table is None:
        return None
    method = table.fields.get("quant_method")
    block = table.fields.get("weight_block_size")
    if method != "fp8" or not (isinstance(block, list) and len(block) == 2):
        raise ValueError(
            f"{table.where}: quant_method = {method!r}, weight_block_size = {block!r}: only fp8 weights with "
            "block scales can be read (quant_method fp8, weight_block_size [rows, columns]); give such a "
            "checkpoint or an unquantized one"
        )
    if not all(isinstance(size, int) and size > 0 for size in block):
        raise table.error("weight_block_size", "must be two whole numbers above 0")
    return BlockFp8(*block)


def check_silu(config: HfConfig) -> None:
    config.one_of("hidden_act", ("silu",), "silu")
