"""Who serves what: the members of a swarm as one value, and how it is kept fresh."""
