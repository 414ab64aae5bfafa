"""The daemon that owns a host's registry of names and ULIDs. Started as `madsci-registryd`; nothing here is an API."""
