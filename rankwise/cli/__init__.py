"""The command line: one file a verb, each parses, calls one function of `jobs`, and prints.  Starts without torch."""
