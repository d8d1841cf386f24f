"""One package per op: op.py (contract and choice), eager.py (PyTorch), kernel.py (Triton)."""
