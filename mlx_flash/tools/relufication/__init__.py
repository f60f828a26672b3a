"""Relufication: gives a model with SiLU exact zeros, by ReLU or FATReLU and distillation."""
