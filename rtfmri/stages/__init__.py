"""The steps of the per-TR path: each owns its streaming state, and only its push changes it."""
