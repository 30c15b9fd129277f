"""Fine-tunes a language model with LoRA: small trained matrices beside frozen weights, then merged into them.

``python examples/lora.py`` makes a small byte-level model, trains it on dates of one form (2026-11-29), freezes it, and
teaches it another form (29.11.2026) by LoRA. ``--model FOLDER --data FILE`` does the second step with a checkpoint of
yours, which must have a tokenizer, and a text. It writes the adapter and the merged model, a Hugging Face checkpoint
that needs no PEFT. Needs transformers and peft; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import trange
from transformers import AutoTokenizer

from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM
from flash_xlstm.training.device import choose_device

# Of weight mode "single". In weight mode "fused" some are joined: model.set_weight_mode("single") splits them.
TARGETS = ["q", "k", "v", "out_proj", "proj_up", "proj_up_gate", "proj_down"]


def dates(form: str, count: int, seed: int) -> Tensor:
    """Random dates, one a line, as bytes."""
    draw = random.Random(seed)
    days = [(draw.randint(1900, 2099), draw.randint(1, 12), draw.randint(1, 28)) for _ in range(count)]
    lines = [form.format(year=year, month=month, day=day) for year, month, day in days]
    return torch.tensor(list("\n".join(lines).encode()))


def train(model: torch.nn.Module, data: Tensor, steps: int, rate: float, args: argparse.Namespace) -> None:
    """Trains those parameters that are not frozen on random windows of the data."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    progress = trange(steps, unit="step", dynamic_ncols=True)
    model.train()
    for _ in progress:
        starts = torch.randint(len(data) - args.sequence, (args.batch,))
        ids = torch.stack([data[s : s + args.sequence] for s in starts.tolist()]).to(args.device)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix_str(f"loss {float(loss.detach()):.3f}", refresh=False)
    model.eval()


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, data: Tensor, args: argparse.Namespace) -> float:
    """Nats a token, on windows that lie side by side."""
    rows = data[: len(data) // args.sequence * args.sequence].view(-1, args.sequence)[: args.batch].to(args.device)
    return float(model(rows, labels=rows).loss)


def small_model(args: argparse.Namespace) -> xLSTMForCausalLM:
    """A byte-level model that knows dates of the first form."""
    no_special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # every byte is text
    config = xLSTMConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_heads=2, **no_special)
    model = xLSTMForCausalLM(config).to(args.device)
    print(f"a base model, {args.base_steps} steps on dates such as 2026-11-29")
    train(model, dates("{year}-{month:02}-{day:02}", 4000, seed=1), args.base_steps, 3e-3, args)
    return model


def positive(text: str) -> int:
    """Reads a count of at least 1. argparse names the option in its error."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("lora"), help="folder for the adapter and the merged model")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder; default: a small model, trained here")
    parser.add_argument("--data", type=Path, help="a text file, for --model")
    parser.add_argument("--steps", type=positive, default=200, help="of LoRA")
    parser.add_argument("--base-steps", type=positive, default=200, help="of the small model before it")
    parser.add_argument("--rank", type=positive, default=8, help="of LoRA's matrices")
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--sequence", type=positive, default=66)
    parser.add_argument("--device", type=choose_device, default="auto", help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    torch.manual_seed(0)

    if args.model is None:
        model = small_model(args)
        data, held_out = (dates("{day:02}.{month:02}.{year}", count, seed) for count, seed in ((4000, 2), (400, 3)))
    else:
        model = xLSTMForCausalLM.from_pretrained(args.model).to(args.device)
        model.set_weight_mode("single")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokens = torch.tensor(tokenizer(args.data.read_text(encoding="utf-8")).input_ids)
        data, held_out = tokens.split([len(tokens) - len(tokens) // 10, len(tokens) // 10])

    before = held_out_loss(model, held_out, args)
    tuned = get_peft_model(model, LoraConfig(target_modules=TARGETS, r=args.rank, task_type="CAUSAL_LM"))
    tuned.print_trainable_parameters()
    train(tuned, data, args.steps, 5e-3, args)
    after = held_out_loss(tuned, held_out, args)
    with tuned.disable_adapter():
        without = held_out_loss(tuned, held_out, args)
    tuned.save_pretrained(args.out / "adapter")  # the small matrices alone
    merged = tuned.merge_and_unload()
    merged.save_pretrained(args.out / "merged")

    again = xLSTMForCausalLM.from_pretrained(args.out / "merged").to(args.device).eval()
    loaded = held_out_loss(again, held_out, args)
    print(f"held-out loss in nats a token: {before:.3f} before, {after:.3f} after")
    print(f"without the adapter {without:.3f}; merged, saved and read again {loaded:.3f}")
    print(f"adapter: {args.out / 'adapter'}; merged: {args.out / 'merged'}")
    if args.model is None:
        prompt = torch.tensor([list(b"\n")], device=args.device)
        text = bytes(again.generate(prompt, max_new_tokens=33, do_sample=True)[0].tolist())
        print(f"a sample: {text.decode(errors='replace').split()}")
    return 0 if after < before and abs(without - before) < 1e-4 and abs(loaded - after) < 1e-3 else 1


if __name__ == "__main__":
    raise SystemExit(main())
