"""`kvferry rollout`: a running cluster is brought to another cluster file, one process after the other, and back.

Owns the plan (pure), what is written down of a rollout under way, and the steps. Who restarts a process is the
launcher, a command that was given, or a person.
"""
