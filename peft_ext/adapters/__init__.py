"""What one does with finished adapters."""
