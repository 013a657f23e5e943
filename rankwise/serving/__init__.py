"""Many adapters behind one base, answered at once: the engine that batches, and the server in front of it."""
