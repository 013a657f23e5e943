"""The operations that decide the speed, each one PyTorch path and, on processors that have BF16, one compiled path."""
