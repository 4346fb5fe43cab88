#!/usr/bin/env python3
"""Trains the embedded model from scratch: freely licensed text -> tokenizer -> DeepSeek-V3 -> HF directory.

    apt-get install r-cran-janeaustenr sword-text-web sword-text-sparv python3.11-doc \\
        libsqlite3-dev libssl-dev libcurl4-openssl-dev zlib1g-dev libpython3.11-dev
    apt-get source --download-only snappy        # in the folder given as --data, else /
    python tools/train_tiny_moe.py --out runs/tiny --minutes 75
    python tools/train_tiny_moe.py --out runs/tiny --minutes 120 --resume     # train the same run longer
    python tools/train_tiny_moe.py --evaluate moeserve/tiny_model             # the table of a checkpoint

Packages can be unpacked anywhere instead of installed (`dpkg-deb -x`): see --data. About an hour on one core.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_moe.corpus import DOMAINS, Documents, read_corpus
from tiny_moe.evaluation import evaluate, table
from tiny_moe.export import export_checkpoint, load_checkpoint
from tiny_moe.model import TinyConfig, TinyMoE
from tiny_moe.tokens import chat_conversations, encode_stream, train_tokenizer
from tiny_moe.training import Limits, Training
from tokenizers import Tokenizer

DEFAULT_TOKENS, SMOKE_TOKENS, SMOKE_BATCH = 14e6, 16 * 1024, 1024
SMOKE_DOCUMENTS, SMOKE_VOCABULARY = 300, 1024


def main() -> int:
    args = _parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        if args.evaluate:
            print(_evaluate(args.evaluate, args.data, args.sequences))
        else:
            _train(args)
    except (FileNotFoundError, ValueError) as error:
        print(f"train_tiny_moe: {error}", file=sys.stderr)
        return 2
    return 0


def _train(args: argparse.Namespace) -> None:
    state_file, tokenizer_file = args.out / "state.pt", args.out / "tokenizer.json"
    if args.resume and not state_file.exists():
        raise FileNotFoundError(f"--resume: {state_file} is missing; leave --resume out to start afresh")
    if state_file.exists() and not args.resume:
        raise ValueError(f"--out: {state_file} is of an earlier run; add --resume or choose another folder")
    args.out.mkdir(parents=True, exist_ok=True)

    corpus = read_corpus(args.data, ["python"] if args.smoke else DOMAINS)
    if args.smoke:
        corpus = {k: Documents(d.train[:SMOKE_DOCUMENTS], d.held_out[:5]) for k, d in corpus.items()}
    for domain, documents in corpus.items():
        size = sum(map(len, documents.train)) / 1e6
        print(f"{domain:10s} {len(documents.train):6d} documents {size:6.2f} MB", flush=True)

    if args.resume:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        print("training the tokenizer", flush=True)
        tokenizer = train_tokenizer(corpus, SMOKE_VOCABULARY if args.smoke else TinyConfig.vocab_size)
        tokenizer.save(str(tokenizer_file))
    print("encoding", flush=True)
    streams = {domain: encode_stream(tokenizer, d.train) for domain, d in corpus.items()}
    conversations = chat_conversations(corpus, 100 if args.smoke else 10_000, args.seed)
    streams["chat"] = encode_stream(tokenizer, conversations)

    config = TinyConfig(vocab_size=tokenizer.get_vocab_size())
    if args.smoke:
        limits = Limits(args.tokens or SMOKE_TOKENS, args.minutes, SMOKE_BATCH)
    else:
        limits = Limits(args.tokens or DEFAULT_TOKENS, args.minutes)
    training = Training(TinyMoE(config), streams, limits, args.seed)
    if args.resume:
        training.resume(state_file)
    training.train(state_file)
    checkpoint = args.out / "checkpoint"
    export_checkpoint(training.weights(), config, tokenizer, checkpoint)
    print(f"{training.tokens:,} tokens in {training.seconds / 60:.1f} minutes; wrote {checkpoint}")
    print(table(evaluate(load_checkpoint(checkpoint), _held_out(corpus, tokenizer), args.sequences)))


def _evaluate(model_dir: Path, data: Path, sequences: int) -> str:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    held_out = _held_out(read_corpus(data, DOMAINS), tokenizer)
    return table(evaluate(load_checkpoint(model_dir), held_out, sequences))


def _held_out(corpus: dict[str, Documents], tokenizer: Tokenizer) -> dict[str, NDArray[np.uint16]]:
    return {domain: encode_stream(tokenizer, documents.held_out) for domain, documents in corpus.items()}


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="run folder: tokenizer, state.pt, and checkpoint/ at the end")
    what.add_argument("--evaluate", type=Path, metavar="DIR", help="print the table of a finished checkpoint")
    parser.add_argument("--data", type=Path, default=Path("/"), help="root of the packages (default: /)")
    parser.add_argument("--tokens", type=float, help="stop after this many tokens (default: 14e6)")
    parser.add_argument("--minutes", type=float, default=120, help="stop after this long, in training")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--smoke", action="store_true", help="seconds, on the standard library alone")
    parser.add_argument("--sequences", type=int, default=40, help="held-out stretches of 256 tokens a domain")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
