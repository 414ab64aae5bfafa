"""The registry of a whole lab: one name, one component, across its hosts.

`from madsci_registry_lab.registry import LabRegistry` for an application of one's own; the command is
`madsci-registry-lab`. docs/lab.md has the routes and what they promise.
"""
