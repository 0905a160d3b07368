"""Records: what a metadata server must still know after a restart, which nobody can tell it again.

Owns how records are kept: durably in a file, in memory, later in etcd. Knows nothing of what they mean. `base` is what
its users see, `opening` makes what a cluster file asks for; a new kind passes the conformance suite.
"""
