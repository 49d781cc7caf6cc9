"""Transport: identities in, authenticated and multiplexed connections out."""
