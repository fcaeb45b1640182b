"""The side of the network that owns the files: pin, register, serve, publish."""
