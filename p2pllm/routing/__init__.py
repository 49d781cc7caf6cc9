"""Which route through the swarm, and which span for a new server: pure functions over a view."""
