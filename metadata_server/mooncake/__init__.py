"""Mooncake's HTTP metadata: what its clients (0.3.13) keep under `/metadata?key=`, durable and without the dead's keys.

Owns whose record is whose, who is alive, and that dialect's words on the wire. Records of their owner are kept under
`metadata/KEY`; that an owner's port has ever answered us, under `metadata-answered/KEY`. Knows nothing of chunks.
"""
