"""Comparison with golden tensors: a folder of weights, inputs and expected outputs of the published implementation."""
