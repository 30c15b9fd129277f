"""Training on many GPUs, by torch.distributed."""
