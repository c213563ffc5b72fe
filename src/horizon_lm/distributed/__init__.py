"""Many ranks: who they are, what they agree on, and how they exchange data, on torch.distributed."""
