"""Adapters on disk: PEFT's folder, read and written; tensors checked before they are believed."""
