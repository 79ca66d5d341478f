"""Steps that wait for a person or ask a server."""
