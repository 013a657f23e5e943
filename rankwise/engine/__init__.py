"""One pass over a routed stream, and everything that is made of passes: training, evaluating, resuming."""
