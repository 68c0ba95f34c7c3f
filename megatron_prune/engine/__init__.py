"""The only room that knows Megatron's globals."""
