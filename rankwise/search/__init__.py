"""Which numbers are enough, measured: what may be left out of an adapter, and how sure that is."""
