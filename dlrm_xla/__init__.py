"""DLRM with replaceable embedding tables, on TPU through torch-xla, on CUDA and on CPU."""

__version__ = "0.1.0"
