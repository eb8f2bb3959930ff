"""Vision DiffMask: gates that learn which patches a model can do without."""
