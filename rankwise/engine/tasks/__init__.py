"""What differs by task, an object each: how documents become model inputs, and which outputs are compared with what."""
