"""What works with NOLA, PRANC and MCNC of what works with LoRA: `python -m benchmarks.parity`."""
