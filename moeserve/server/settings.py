"""What the front-end and the HTTP server are told about the model and their limits. Plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """Facts of the model first, then limits of the server; None switches a limit off where nothing else is said."""

    model_name: str
    max_seq_len: int  # tokens, prompt and completion together
    max_batch_size: int  # sequences that one replica runs at once
    num_ranks: int  # ranks whose readiness and heartbeat are awaited
    num_moe_layers: int = 0
    top_k: int = 0
    config_hash: str = "0"  # of the resolved configuration, for system_fingerprint

    api_keys: tuple[str, ...] = ()
    max_queued_requests: int = 1024  # sequences waiting for a place in a batch, over all replicas
    max_queued_tokens: int | None = 1_000_000  # their prompt tokens
    max_choices: int = 128  # n
    max_sequences: int = 1024  # prompts x n of one request
    max_stop_strings: int = 4
    max_stop_length: int = 256  # characters
    max_logit_bias: int = 1024
    max_body_bytes: int | None = None  # None: what max_seq_len needs, at least 1 MiB
    request_timeout: float | None = None  # seconds from arrival to the last token
    heartbeat_timeout: float = 30.0  # seconds without a word from a rank until readiness fails
    drain_timeout: float | None = None  # seconds that running requests have after SIGTERM
    balance_replicas: bool = True  # attention_dp_config.enable_balance; False: in turn
    survive_rank_loss: bool = False  # on_rank_loss = shrink
    metrics_compat: str = "vllm"  # vllm | sglang | none

    @property
    def body_limit(self) -> int:
        """Reading JSON holds up all streams, about 0.2 s a MiB at worst: no more than prompts need."""
        return self.max_body_bytes or max(1 << 20, 64 * self.max_seq_len)
