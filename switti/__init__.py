"""Scale-wise transformers for text-to-image synthesis (arXiv 2412.01819): plain PyTorch, no Lightning, no YAML."""

__version__ = "0.1.0"
