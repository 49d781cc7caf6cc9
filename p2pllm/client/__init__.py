"""Using the swarm: routes, sessions, generation."""
