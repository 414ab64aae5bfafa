"""The command line `registryctl`: a client of the registry like any other, without rights of its own."""
