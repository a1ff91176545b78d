"""Tensors in, tensors out: the operations on the hot path, each beside the definition that it must
equal."""
