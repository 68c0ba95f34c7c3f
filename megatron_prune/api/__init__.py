"""What ``import megatron_prune`` offers: the functions behind the verbs, and what they return."""
