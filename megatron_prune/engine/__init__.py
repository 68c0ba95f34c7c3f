"""The only package that uses Megatron's globals."""
