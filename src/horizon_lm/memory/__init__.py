"""Where bytes live: layout, exact host allocations, the store, device slots."""
