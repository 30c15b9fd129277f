"""``flash-xlstm generate``."""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from flash_xlstm.cli.errors import CommandError
from flash_xlstm.models import xLSTMForCausalLM
from flash_xlstm.training import checkpoint
from flash_xlstm.training.data import encode, library_errors
from flash_xlstm.training.device import choose_device


def run(args: argparse.Namespace) -> int:
    """Continues a prompt as the command line says."""
    device = choose_device(args.device)
    folder = checkpoint.locate(args.checkpoint)
    model, tokenizer = load(folder, device)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    stream(
        model, tokenizer, args.prompt, args.max_new_tokens,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
    )  # fmt: skip
    return 0


def load(folder: Path, device: torch.device) -> tuple[xLSTMForCausalLM, Tokenizer | None]:
    """A checkpoint's model, set up for fast decoding, and its tokenizer.

    Raises:
        CommandError: the checkpoint is incomplete, or the tokenizer does not fit the model.
    """
    model = checkpoint.load_model(folder, mode="inference", weight_mode="fused")
    return model.to(device).eval(), checkpoint.load_tokenizer_of(folder, model.config.vocab_size)


def stream(
    model: xLSTMForCausalLM,
    tokenizer: Tokenizer | None,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> None:
    """Prints a prompt and its continuation as it is made.

    Args:
        model: a model.
        tokenizer: None for bytes.
        prompt: at least one token.
        max_new_tokens: the most tokens to add. Generation stops earlier at an end-of-text token.
        temperature: of sampling; 0 selects the likeliest token.
        top_k, top_p: restrict sampling to the likeliest tokens.

    Raises:
        CommandError: the prompt is empty.
    """
    ids = list(_bytes(prompt)) if tokenizer is None else encode(tokenizer, [prompt]).tolist()
    if not ids:
        raise CommandError("the prompt is empty; give at least one character")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        top_k, top_p = top_k or 0, 1.0 if top_p is None else top_p
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    special = checkpoint.special_tokens(model)
    if special["pad_token_id"] is None:  # one row is never padded
        special["pad_token_id"] = 0
    input_ids = torch.tensor([ids], device=model.device)
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),  # a pad token within a prompt is text
        generation_config=GenerationConfig(max_new_tokens=max_new_tokens, **special, **sampling),
        streamer=_Terminal(prompt, _byte_decoder() if tokenizer is None else _token_decoder(tokenizer, ids)),
    )


class _Terminal(BaseStreamer):
    """Prints the characters that the tokens so far determine."""

    def __init__(self, prompt: str, decode: Callable[[int, bool], str]) -> None:
        self.decode = decode
        self.prompt: str | None = prompt

    def put(self, value: Tensor) -> None:
        if self.prompt is not None:  # the first call passes the prompt
            _print(self.prompt)
            self.prompt = None
            return
        for token in value.flatten().tolist():
            _print(self.decode(token, False))

    def end(self) -> None:
        _print(self.decode(-1, True) + "\n")


def _byte_decoder() -> Callable[[int, bool], str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda token, final: decoder.decode(b"" if final else bytes([token]), final)


def _token_decoder(tokenizer: Tokenizer, prompt: list[int]) -> Callable[[int, bool], str]:
    decoder = DecodeStream(ids=prompt, skip_special_tokens=True)

    def decode(token: int, final: bool) -> str:
        if final or tokenizer.id_to_token(token) is None:  # a model may have spare embeddings
            return ""
        with library_errors("the tokenizer cannot decode what was generated"):
            return decoder.step(tokenizer, token) or ""

    return decode


def _bytes(prompt: str) -> bytes:
    return prompt.encode("utf-8", "surrogateescape")  # arguments that are not UTF-8 are passed on byte for byte


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
