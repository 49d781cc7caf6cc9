"""A Kademlia DHT of signed records: who is where, and who serves what."""
