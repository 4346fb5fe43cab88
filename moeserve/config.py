"""The engine's settings: their names, defaults and ranges, and how YAML and flags become one object.

Keys follow TensorRT-LLM's names. Knows no model: what depends on one is settled in `plan`.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

EMBEDDED_MODEL = Path(__file__).parent / "tiny_model"

Config = TypeVar("Config")


def setting(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A field with its one line of help and the range it may lie in (both ends allowed)."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def section(config: type) -> Any:
    return field(default_factory=config)


@dataclass(frozen=True)
class AttentionDPConfig:
    enable_balance: bool = setting(True, "even the tokens over attention replicas and align their prefills")
    timeout_iters: int = setting(50, "steps a prefill waits for the other replicas to have one", low=0)
    batching_wait_iters: int = setting(10, "steps a prefill then waits for more to fill the batch", low=0)


@dataclass(frozen=True)
class KVCacheConfig:
    free_gpu_memory_fraction: float = setting(0.9, "share of the free device memory to use", 0.01, 1.0)
    tokens_per_block: int = setting(32, "tokens a page", low=1, high=1024)
    enable_block_reuse: bool = setting(True, "reuse the pages of prompts that begin alike")
    max_tokens: int | None = setting(None, "tokens the cache holds on a rank; null: by memory", low=1)


@dataclass(frozen=True)
class OnlineConfig:
    """How the placement follows the traffic; routing holds for a placement that stays, too."""

    window_steps: int = setting(50, "steps whose counts make one window", low=1)
    windows: int = setting(16, "newest windows that a decision looks at", low=2, high=1024)
    policy: Literal["auto", "greedy", "fast", "robust", "connected", "hierarchical", "exact"] = setting(
        "auto", "auto: improve the placement in force; else solve from scratch by this policy"
    )
    max_moves_per_layer: int = setting(
        4, "slots of a layer that one decision may change; 0: routes only", low=0
    )
    min_gain: float = setting(0.02, "least relative gain in imbalance that is acted on", low=0, high=0.9)
    routing: Literal["even", "shares", "step"] = setting(
        "shares", "how replicas share tokens: evenly, by the placement, or by each step's own load"
    )
    max_bytes_per_second: float | None = setting(
        None, "that a rank may send and receive of moved weights; null: no limit", low=1000
    )
    survive_rank_loss: bool = setting(False, "keep every expert on two ranks at least")


@dataclass(frozen=True)
class LoadBalancerConfig:
    num_slots: int | None = setting(None, "expert slots over all ranks; null: one an expert", low=1)
    placement: str | None = setting(None, "placement.json with the experts of the slots at start")
    initial_global_assignments: dict[int, list[int]] | None = setting(
        None, "experts of the slots by absolute layer id, as in TensorRT-LLM's file"
    )
    layer_updates_per_iter: int = setting(0, "layers migrated a step; 0: the placement stays", low=0)
    online: OnlineConfig = section(OnlineConfig)
    on_rank_loss: Literal["fail", "shrink"] = setting(
        "fail", "when a rank dies: end, or go on without it where every expert is on two ranks"
    )


@dataclass(frozen=True)
class MoEConfig:
    all_to_all: Literal["auto", "one_sided", "exchange", "gather"] = setting(
        "auto", "how tokens travel to the ranks of their experts"
    )
    load_balancer: LoadBalancerConfig = section(LoadBalancerConfig)


@dataclass(frozen=True)
class EngineConfig:
    """Everything that `moeserve serve` can be told, before a model is looked at."""

    model: str = setting(str(EMBEDDED_MODEL), "Hugging Face style model directory")
    served_model_name: str | None = setting(None, "name in the API; null: the directory's")
    tensor_parallel_size: int = setting(1, "ranks of a pipeline stage", low=1)
    enable_attention_dp: bool = setting(False, "replicate attention, part the requests")
    attention_tensor_parallel_size: int | None = setting(
        None, "with attention DP: ranks that share one attention replica; null: 1", low=1
    )
    moe_tensor_parallel_size: int | None = setting(None, "ranks that share one expert's weights", low=1)
    moe_expert_parallel_size: int | None = setting(None, "ranks or groups the experts are spread over", low=1)
    pipeline_parallel_size: int = setting(1, "pipeline stages", low=1)
    context_parallel_size: int = setting(1, "ranks that part one context", low=1)
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of weights and activations; auto: float32 on CPU, else the checkpoint's"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda if there is one, else cpu")
    max_batch_size: int = setting(256, "sequences a step on one attention replica", low=1)
    max_num_tokens: int = setting(8192, "tokens a step on one attention replica", low=1)
    max_seq_len: int | None = setting(None, "tokens of prompt and answer; null: the model's", low=2)
    enable_chunked_prefill: bool = setting(True, "part long prompts over several steps")
    attention_dp_config: AttentionDPConfig = section(AttentionDPConfig)
    kv_cache_config: KVCacheConfig = section(KVCacheConfig)
    moe_config: MoEConfig = section(MoEConfig)
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on", low=0, high=65535)
    api_key: str | None = setting(None, "key that clients must send; several separated by commas")
    max_queued_requests: int = setting(
        1024, "sequences that may wait for a seat before new ones get 429", low=1
    )
    max_queued_tokens: int | None = setting(
        None, "prompt tokens that may wait before 429; null: no cap", low=1
    )
    request_timeout: float | None = setting(None, "seconds a request may take; null: no limit", low=0.001)
    drain_timeout: float = setting(60.0, "seconds that running requests get after SIGTERM", low=0)
    record_stats: str | None = setting(
        None, "folder to keep a record of the expert load in, which eplb-offline reads"
    )
    metrics_compat: Literal["vllm", "sglang", "none"] = setting("vllm", "whose metric names to add")
    num_threads: int | None = setting(None, "CPU threads a rank; null: the cores shared out", low=1)


FLAG_ALIASES = {
    "tensor_parallel_size": ("--tp-size", "--tp_size"),
    "moe_expert_parallel_size": ("--ep-size", "--ep_size"),
}


def parse(config: type[Config], values: Mapping[str, Any], path: str = "") -> Config:
    """A checked `config` object from nested plain values, as YAML gives them.

    Raises ValueError naming the key with its full path, the value and what would do.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{path.rstrip('.') or 'the file'} = {values!r}: must be a table of settings")
    fields = {f.name: f for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise ValueError(f"{path}{key}: unknown setting; known are {known}")
    hints = typing.get_type_hints(config)
    parsed = {key: _parse_value(hints[key], fields[key], value, path) for key, value in values.items()}
    return config(**parsed)


def _parse_value(hint: Any, spec: dataclasses.Field[Any], value: Any, path: str) -> Any:
    name = path + spec.name
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), {} if value is None else value, name + ".")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in options:
        return None
    (kind,) = (option for option in options if option is not types.NoneType)
    value = _coerce(kind, value, name)
    low, high = spec.metadata["low"], spec.metadata["high"]
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} = {value!r}: must be {wanted}")
    return value


def _coerce(kind: Any, value: Any, name: str) -> Any:
    """`value` as `kind`, exactly: no truth values for numbers, no numbers for text."""
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{name} = {value!r}: must be one of {', '.join(typing.get_args(kind))}")
        return value
    if typing.get_origin(kind) is dict:
        return _coerce_assignments(value, name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ValueError(f"{name} = {value!r}: must be {words[kind]}")
    if kind is str and not value.strip():  # mostly an unset variable of a shell: api_key would guard nothing
        raise ValueError(f"{name} = {value!r}: is empty; leave it out or give it a value")
    return value


def _coerce_assignments(value: Any, name: str) -> dict[int, list[int]]:
    wanted = f"{name} must map layer ids to lists of expert ids"
    if not isinstance(value, Mapping):
        raise ValueError(f"{wanted}, is {type(value).__name__}")
    for layer, experts in value.items():
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise ValueError(f"{wanted}; {layer!r} is no layer id")
        if not isinstance(experts, list) or not all(type(expert) is int for expert in experts):
            raise ValueError(f"{wanted}; layer {layer} has {experts!r:.60}")
    return dict(value)


def add_flags(parser: argparse.ArgumentParser, config: type = EngineConfig, path: str = "") -> None:
    """A flag for each setting, `--a-b` and `--a_b` alike; those of a section as `--section.name`."""
    for spec, hint in zip(dataclasses.fields(config), typing.get_type_hints(config).values(), strict=True):
        name = path + spec.name
        if dataclasses.is_dataclass(hint):
            add_flags(parser, typing.cast(type, hint), name + ".")
        elif name != "model":
            spellings = dict.fromkeys(
                (f"--{name.replace('_', '-')}", f"--{name}", *FLAG_ALIASES.get(name, ()))
            )
            optional: dict[str, Any] = {"nargs": "?", "const": "true"} if hint is bool else {}
            help_text = f"{spec.metadata['help']} (default: {_shown(spec.default)})".replace("%", "%%")
            parser.add_argument(
                *spellings, dest=name, metavar="VALUE", default=argparse.SUPPRESS, help=help_text, **optional
            )


def _shown(default: Any) -> str:
    return str(yaml.safe_dump(default)).split("\n")[0]


def read_config(flags: argparse.Namespace) -> EngineConfig:
    """The settings of `--config FILE` overlaid with the flags that were given.

    Raises ValueError naming the file or the setting.
    """
    given = dict(vars(flags))
    values: dict[str, Any] = {}
    file = given.pop("config", None)
    if file is not None:
        values = _read_yaml(file)
    hints = _hints_by_path(EngineConfig)
    for name, text in given.items():
        if name in hints and text is not None:
            *sections, last = name.split(".")
            table = values
            for depth, part in enumerate(sections, 1):
                inner = table.get(part)
                if not isinstance(inner, (Mapping, types.NoneType)):
                    raise ValueError(f"{'.'.join(sections[:depth])} = {inner!r}: must be a table of settings")
                table[part] = dict(inner or {})
                table = table[part]
            table[last] = _flag_value(hints[name], text, name)
    return parse(EngineConfig, values)


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise ValueError(f"--config {file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file}: not YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"--config {file}: must be a table of settings, is {type(loaded).__name__}")
    return loaded


def _hints_by_path(config: type, path: str = "") -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            hints |= _hints_by_path(typing.cast(type, hint), f"{path}{name}.")
        else:
            hints[path + name] = hint
    return hints


def _flag_value(hint: Any, text: str, name: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if str in options or any(typing.get_origin(option) is Literal for option in options):
        return None if text == "null" and types.NoneType in options else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} = {text!r}: cannot be read as a value") from error


def parse_arguments(arguments: Sequence[str]) -> EngineConfig:
    """The settings of a command line such as `["MODEL", "--tp-size", "4"]`."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_model_and_flags(parser)
    return read_config(parser.parse_args(arguments))


def add_model_and_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=None,
        metavar="MODEL",
        help="model directory (default: the embedded model)",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings; flags win")
    add_flags(parser)
