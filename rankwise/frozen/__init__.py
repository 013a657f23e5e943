"""The base: found, loaded in a number format this machine is good at, recognised again by its fingerprint."""
