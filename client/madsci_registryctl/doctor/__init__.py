"""`doctor`, a folder of its own: `command` is what a person types, `checks` and their like look, `crash_test` tries."""
