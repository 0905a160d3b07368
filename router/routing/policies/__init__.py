"""The policies: a module each, of the name that the cluster file gives it (`router.policy`), with a `make()`.

Owns weights only. Filters and scorers that several of them use lie beside this folder (docs/how-to/policy.md).
"""
