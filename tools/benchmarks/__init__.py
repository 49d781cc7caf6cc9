"""One module per benchmark; see tools/bench."""
