"""The ground floor: types, chunk keys, errors, configuration, clock, service runner, names of metrics.

Imports the standard library and msgspec only (telemetry also prometheus_client, config PyYAML, http httptools and
aiohappyeyeballs, process uvicorn, starlette and aiohttp, trust cryptography).
Owns no I/O policy, no protocol between processes and no KV bytes.
"""
