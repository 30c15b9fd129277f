"""Reads a long text once, keeps its state, and goes on from it for many questions.

An xLSTM's state has one size, however long the text is. So the state of a long prefix is a small file, and each
question costs its own tokens alone. ``python examples/prefix_caching.py`` shows it with a small model of random weights
and a random text: the answers say nothing, but they are those of reading everything anew, and the times are real.
``--model FOLDER --prefix FILE --question TEXT`` takes a checkpoint of yours, with its tokenizer. Needs transformers;
nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from flash_xlstm.models import xLSTMCache, xLSTMConfig, xLSTMForCausalLM
from flash_xlstm.training.device import choose_device


def read_prefix(model: xLSTMForCausalLM, prefix: Tensor, path: Path) -> None:
    """Reads the prefix, (tokens,), and keeps the state behind it in a file."""
    with torch.no_grad():
        # No logits but the last token's: they would be the largest tensor.
        cache = model(prefix[None], use_cache=True, logits_to_keep=1).cache_params
    cache.save(path)


def pad(questions: list[Tensor], filler: int) -> tuple[Tensor, Tensor]:
    """Questions of any lengths as rows, padded on the left, and their mask: both (questions, tokens)."""
    longest = max(map(len, questions))
    ids = torch.full((len(questions), longest), filler)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(questions):
        ids[row, longest - len(question) :] = question
        mask[row, longest - len(question) :] = 1
    return ids, mask


def answer(model: xLSTMForCausalLM, path: Path, questions: list[Tensor], new_tokens: int) -> Tensor:
    """Greedy answers, (questions, new_tokens), each from the kept state of the prefix."""
    cache = xLSTMCache.load(path, model.config, model.device).expand(len(questions))
    ids, mask = (x.to(model.device) for x in pad(questions, filler=0))
    # The mask covers what the cache has seen, too.
    mask = torch.cat([mask.new_ones(len(questions), cache.get_seq_length()), mask], 1)
    tokens = model.generate(ids, attention_mask=mask, cache_params=cache, max_new_tokens=new_tokens, do_sample=False)
    return tokens[:, ids.shape[1] :]


def answer_anew(model: xLSTMForCausalLM, prefix: Tensor, question: Tensor, new_tokens: int) -> Tensor:
    """The same for one question, reading the prefix with it: (new_tokens,)."""
    whole = torch.cat([prefix, question])[None].to(model.device)
    return model.generate(whole, max_new_tokens=new_tokens, do_sample=False)[0, whole.shape[1] :]


def positive(text: str) -> int:
    """Reads a count of at least 1. argparse names the option in its error."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=Path("prefix.safetensors"), help="file for the prefix's state")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder; default: a small model with random weights")
    parser.add_argument("--prefix", type=Path, help="a text file, for --model")
    parser.add_argument("--question", action="append", help="for --model; may be given several times")
    parser.add_argument("--tokens", type=positive, default=20_000, help="length of the random text")
    parser.add_argument("--new-tokens", type=positive, default=16)
    parser.add_argument("--device", type=choose_device, default="auto", help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    if not (args.model is None) == (args.prefix is None) == (args.question is None):
        parser.error("--model, --prefix and --question go together")
    torch.manual_seed(0)

    tokenizer = None
    if args.model is None:
        no_special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # every id is text
        config = xLSTMConfig(vocab_size=256, hidden_size=128, num_hidden_layers=4, num_heads=4, **no_special)
        model = xLSTMForCausalLM(config).to(args.device).eval()
        prefix, questions = torch.randint(256, (args.tokens,)), [torch.randint(256, (n,)) for n in (12, 5, 30)]
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = xLSTMForCausalLM.from_pretrained(args.model).to(args.device).eval()
        prefix = tokenizer(args.prefix.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
        questions = [
            tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0] for text in args.question
        ]

    began = time.monotonic()
    read_prefix(model, prefix.to(args.device), args.state)
    read = time.monotonic()
    answers = answer(model, args.state, questions, args.new_tokens)
    answered = time.monotonic()
    anew = answer_anew(model, prefix, questions[0], args.new_tokens)
    done = time.monotonic()

    print(f"{len(prefix):,} tokens read in {read - began:.2f} s; their state: {args.state.stat().st_size:,} bytes")
    print(f"{len(questions)} questions answered from it in {answered - read:.2f} s")
    print(f"the first of them with everything read anew: {done - answered:.2f} s")
    for row in answers:
        print(tokenizer.decode(row) if tokenizer else row.tolist())
    same = torch.equal(answers[0], anew)
    print("the first answer is the same both ways" if same else "the two ways differ: a tie in rounding")
    return 0 if same or args.model else 1


if __name__ == "__main__":
    raise SystemExit(main())
