"""Small models and batches that are the same in every process, and what one process makes of them."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM

VOCABULARY = 48


def make(**options):
    """A model in training mode. Gates look at the input."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_heads": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = xLSTMForCausalLM(xLSTMConfig(**{**sizes, **options})).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def batch(number, rows=2, seq=12, ignored=0):
    """Ids, and labels of which each row's last `ignored` do not count."""
    ids = torch.randint(0, VOCABULARY, (rows, seq), generator=torch.Generator().manual_seed(number))
    labels = ids.clone()
    labels[:, seq - ignored :] = -100
    return ids, labels


def expected(model, batches):
    """The mean loss of all labels of `batches`, and gradients by name; None of parameters that have none."""
    count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batches)
    loss = sum(model(ids, labels=labels, num_items_in_batch=count).loss for ids, labels in batches)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def check_gradients(model, gradients, tolerance=1e-5):
    """Those of a split model are `gradients`, each within `tolerance` of its largest value; a gate's bias, a sum of
    terms as large as its weight's gradient that may cancel, of that one's. The whole model's own is 1.2e-5 of its
    largest value off in float32."""
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    assert found.keys() == gradients.keys()
    for name, wanted in gradients.items():
        if wanted is None:
            assert found[name] is None, name
            continue
        largest = wanted.abs().max()
        if name.endswith("preact.bias"):
            largest = max(largest, gradients[name[:-4] + "weight"].abs().max())
        error = (whole(found[name]) - wanted).abs().max() / largest
        assert error < tolerance, f"{name}: {error:.1e}"
