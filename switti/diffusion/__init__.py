"""Invertible consistency distillation (arXiv 2406.14539): jumps along a diffusion ODE, their training, and editing."""
