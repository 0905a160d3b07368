"""Records in etcd: calls to its members, records over them, watches that survive compaction and a lost member.

etcd3aio is used for etcd's own messages and stubs only: which member is asked, for how long, and what a lost answer
means is decided here (its own calls repeat writes, and its watches stay with one member).
"""
