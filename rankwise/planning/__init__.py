"""Memory known before it is spent, from shapes alone."""
