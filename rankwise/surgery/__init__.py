"""Where adapters meet a model: its sites, the one adapted layer, the bank, routes, merging and its proof."""
