"""`registryctl lab`, and `--lab`: the registry of the whole lab, through the daemon or asked itself."""
