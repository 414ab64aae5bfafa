"""`service`, a folder of its own: `command` is what a person types and reads, `choice` which service is meant, `plan`
its files and commands (pure, with the files' text in `units`), `reach` whether a hardened unit could run this program;
`work` does it, with `files`, `systemd` and, where a client's daemon serves, `takeover`.

The units themselves are the repository's `systemd/`, here by the relative link `units`.
"""
