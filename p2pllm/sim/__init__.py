"""Virtual time, an internet in memory, a fake model: whole swarms inside one test."""
